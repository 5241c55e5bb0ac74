"""Options, the pinned threads, and the JSON's contents."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .machine import describe, load
from .protocol import Run, Turns
from .results import Result

_BEGIN = time.monotonic()

Measure = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("smoa-kernels")
    group.addoption("--smoke", action="store_true", help="tiny sizes: does every benchmark pass its gate")
    group.addoption("--threads", type=int, default=1, help="intra-op threads (default 1)")


def pytest_configure(config: pytest.Config) -> None:
    # The tests do not time by default; benchmarks do. pytest-benchmark's own table is left out: its rows would be
    # rounds over all providers, which mean nothing.
    config.option.benchmark_disable = False
    config.option.benchmark_enable = True
    config.option.benchmark_quiet = True
    torch.set_num_threads(config.option.threads)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.clear()
    machine_info.update(describe(config.option.smoke))
    # Taken at the end, when the JSON is written, so that gates and warm-ups count. `make bench` limits this time.
    machine_info["suite_seconds"] = round(time.monotonic() - _BEGIN)


@pytest.fixture(scope="session")
def smoke(request: pytest.FixtureRequest) -> bool:
    """Whether to run tiny sizes."""
    return bool(request.config.option.smoke)


@pytest.fixture
def measure(benchmark: BenchmarkFixture, smoke: bool) -> Measure:
    """Time providers in turns by the protocol and keep the seconds for the JSON.

    A round of pytest-benchmark is one round over all providers. There are as many rounds as fit into a budget of
    seconds, but at least `least`. `verify` is a gate that checks results of the timed calls; it runs before anything is
    recorded.
    """

    def run(
        kind: str,
        title: str,
        params: Mapping[str, Any],
        variants: Mapping[str, Run],
        *,
        baseline: str,
        budget: float,
        least: int = 7,
        warmup: int = 2,
        verify: Callable[[], None] = lambda: None,
        bytes: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:
        turns = Turns(variants, baseline)
        before = load()
        one = turns.warm_up(1 if smoke else warmup)
        rounds = 2 if smoke else max(least, min(40, int(budget / one) if one else least))
        benchmark.pedantic(turns.round, rounds=rounds)
        verify()
        seconds = {phase: dict(comparison.seconds) for phase, comparison in turns.comparisons().items()}
        result = Result(kind, title, dict(params), baseline, [before, load()], seconds, bytes or {})
        benchmark.extra_info.update(vars(result))

    return run
