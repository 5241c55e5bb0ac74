"""The device of the kernels' tests, and memory that reveals unwritten results and reads out of bounds."""

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import Guarded
from problems import DEVICE


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU if there is one, else the CPU with Triton's interpreter (tests/conftest.py)."""
    return DEVICE


@pytest.fixture(autouse=True)
def _unwritten_memory_shows(poisoned_memory: None) -> None:
    """Every test here uses the fixture."""


@pytest.fixture
def guarded() -> Iterator[Guarded]:
    guard = Guarded()
    yield guard
    guard.check()
