"""Options, the pinned threads, and the file of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from . import results
from .machine import commit, describe, load
from .protocol import Run, Turns
from .results import Result

_BEGIN = time.monotonic()
_RESULTS: list[Result] = []

Measure = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("smoa-kernels")
    group.addoption("--smoke", action="store_true", help="tiny sizes: does every benchmark pass its gate")
    group.addoption("--json", type=Path, help="write the run to this file")
    group.addoption("--threads", type=int, default=1, help="intra-op threads (default 1)")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.option.threads)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the run, also of a session that failed or was interrupted."""
    options = session.config.option
    if options.json is not None:
        # Gates and warm-ups count: this is what `make bench` limits.
        machine = {**describe(options.smoke), "suite_seconds": round(time.monotonic() - _BEGIN)}
        date = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
        run = results.Run(machine, commit(), date, tuple(_RESULTS))
        results.write(options.json, results.compact(run))


@pytest.fixture
def record() -> Callable[[Result], None]:
    """Keep a result for the run's file."""
    return _RESULTS.append


@pytest.fixture(scope="session")
def smoke(request: pytest.FixtureRequest) -> bool:
    """Whether to run tiny sizes."""
    return bool(request.config.option.smoke)


@pytest.fixture
def measure(record: Callable[[Result], None], smoke: bool) -> Measure:
    """Time providers in turns by the protocol and keep the seconds.

    There are as many rounds as fit into a budget of seconds, but at least `least`. `verify` is a gate that checks
    results of the timed calls; it runs before anything is recorded.
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
        for _ in range(2 if smoke else max(least, min(40, int(budget / one) if one else least))):
            turns.round()
        verify()
        seconds = {phase: dict(comparison.seconds) for phase, comparison in turns.comparisons().items()}
        record(Result(kind, title, dict(params), baseline, [before, load()], seconds, bytes or {}))

    return run
