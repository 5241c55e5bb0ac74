"""The option, the one pinned thread, and the JSON's contents."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .machine import describe
from .results import measured

_BEGIN = time.monotonic()

Measure = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("smoa-kernels")
    group.addoption("--smoke", action="store_true", help="tiny sizes: does every benchmark pass its gate")


def pytest_configure(config: pytest.Config) -> None:
    # The tests do not time by default; benchmarks do. pytest-benchmark's own table is left out: its times are those of
    # whole comparisons, which mean nothing.
    config.option.benchmark_disable = False
    config.option.benchmark_enable = True
    config.option.benchmark_quiet = True
    torch.set_num_threads(1)


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
    """Time providers in turns (`results.measured`), and keep the result for the JSON."""

    def run(*about: Any, **options: Any) -> None:
        result = benchmark.pedantic(measured, about, {**options, "smoke": smoke})
        benchmark.extra_info.update(vars(result))

    return run
