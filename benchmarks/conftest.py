"""Options, the one pinned thread, and the run's file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from .machine import commit, describe
from .results import Result, Run, compact, measured, write

_BEGIN = time.monotonic()

Measure = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("smoa-kernels")
    group.addoption("--smoke", action="store_true", help="tiny sizes: does every benchmark pass its gate")
    group.addoption("--results", type=Path, default=Path(".benchmarks/run.json"), help="the run's JSON file")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smoke(request: pytest.FixtureRequest) -> bool:
    """Whether to run tiny sizes."""
    return bool(request.config.option.smoke)


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest, smoke: bool) -> Iterator[list[Result]]:
    """The results so far; the run is written at the end, also after a failure or Ctrl-C."""
    found: list[Result] = []
    yield found
    # Gates and warm-ups count, because `make bench` limits this time.
    machine = {**describe(smoke), "suite_seconds": round(time.monotonic() - _BEGIN)}
    date = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    write(request.config.option.results, compact(Run(machine, commit(), date, tuple(found))))


@pytest.fixture
def measure(results: list[Result], smoke: bool) -> Measure:
    """Time providers in turns (`results.measured`), and keep the result."""

    def run(*about: Any, **options: Any) -> None:
        results.append(measured(*about, **options, smoke=smoke))

    return run
