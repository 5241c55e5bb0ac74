"""Memory that reveals unwritten results and reads out of bounds."""

from collections.abc import Iterator

import pytest
from kernel_cases import Guarded


@pytest.fixture(autouse=True)
def _unwritten_memory_shows(poisoned_memory: None) -> None:
    """Every test here uses the fixture."""


@pytest.fixture
def guarded() -> Iterator[Guarded]:
    guard = Guarded()
    yield guard
    guard.check()
