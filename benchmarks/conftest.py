"""Options, the pinned threads, and the run's file."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from .results import Result, Run, compact, measured, write

_BEGIN = time.monotonic()
_RESULTS: list[Result] = []

Measure = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("smoa-kernels")
    group.addoption("--smoke", action="store_true", help="tiny sizes: does every benchmark pass its gate")
    group.addoption("--threads", type=int, default=1, help="intra-op threads (default 1)")
    group.addoption("--json", type=Path, help="write the run to this file")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.option.threads)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (path := session.config.option.json) is None:
        return
    run = Run.here(session.config.option.smoke, *_RESULTS)
    # The time of gates and warm-ups counts: `make bench` limits it.
    machine = {**run.machine, "suite_seconds": round(time.monotonic() - _BEGIN)}
    write(path, compact(replace(run, machine=machine)))


@pytest.fixture(scope="session")
def smoke(request: pytest.FixtureRequest) -> bool:
    """Whether to run tiny sizes."""
    return bool(request.config.option.smoke)


@pytest.fixture
def keep() -> Callable[[Result], None]:
    """Keep a result for the run's file."""
    return _RESULTS.append


@pytest.fixture
def measure(smoke: bool) -> Measure:
    """Time providers in turns (`results.measured`), and keep the result."""

    def run(*about: Any, **options: Any) -> None:
        _RESULTS.append(measured(*about, smoke=smoke, **options))

    return run
