"""Where the kernels run, and memory that shows what they leave unwritten or read too far."""

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import Guarded
from problems import DEVICE


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one, else CPU tensors under Triton's interpreter (tests/conftest.py)."""
    return DEVICE


@pytest.fixture(autouse=True)
def _unwritten_memory_shows(poisoned_memory: None) -> None:
    """Every test here runs with it."""


@pytest.fixture
def guarded() -> Iterator[Guarded]:
    guard = Guarded()
    yield guard
    guard.check()
