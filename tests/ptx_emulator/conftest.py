"""These tests run in sessions of their own (`make emulate`): kernels are compiled there, and interpreted elsewhere."""

import os

import pytest

collect_ignore_glob = [] if os.environ.get("PTX_EMULATOR") else ["test_*.py"]


@pytest.fixture(autouse=True)
def _unwritten_memory_shows(poisoned_memory: None) -> None:
    """Every test here runs with it."""
