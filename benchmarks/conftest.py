"""Options, the pinned threads, and the table that a person reads at the end."""

from __future__ import annotations

import os
import platform

import pytest
import torch
from protocol import Comparison

_RESULTS: list[tuple[str, Comparison]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("smoa-kernels")
    group.addoption(
        "--smoke", action="store_true", help="tiny sizes: does every benchmark run and pass its gate"
    )
    group.addoption("--threads", type=int, default=1, help="intra-op threads (default 1)")


@pytest.fixture(scope="session")
def smoke(request: pytest.FixtureRequest) -> bool:
    """Whether to run tiny sizes."""
    return bool(request.config.getoption("--smoke"))


@pytest.fixture(autouse=True, scope="session")
def _threads(request: pytest.FixtureRequest) -> None:
    torch.set_num_threads(request.config.getoption("--threads"))


@pytest.fixture
def report(benchmark):
    """Keep a comparison for the table, and in the benchmark's JSON (`extra_info`)."""

    def keep(title: str, comparison: Comparison) -> None:
        _RESULTS.append((title, comparison))
        benchmark.extra_info.update(
            title=title,
            baseline=comparison.baseline,
            spread=comparison.spread,
            noisy=comparison.noisy,
            measured_on="GPU" if torch.cuda.is_available() else "CPU",
            ratios={name: [t.ratio, t.low, t.high] for name, t in comparison.timings.items()},
            load=os.getloadavg(),
        )

    return keep


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _RESULTS:
        return
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"
    terminalreporter.section("ratios, medians of rounds [interquartile range]")
    terminalreporter.line(
        f"measured on {where}; torch {torch.__version__}; {torch.get_num_threads()} thread(s); "
        f"load {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores"
    )
    for title, comparison in _RESULTS:
        mark = "  NOISY, do not quote" if comparison.noisy else ""
        terminalreporter.line("")
        terminalreporter.line(f"{title}   (over {comparison.baseline}, spread {comparison.spread:.0%}){mark}")
        for name, t in comparison.timings.items():
            terminalreporter.line(
                f"  {name:<22} {t.ratio:6.2f} [{t.low:.2f}, {t.high:.2f}]  {t.seconds * 1e3:9.2f} ms"
            )
