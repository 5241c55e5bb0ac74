"""These tests run in separate sessions (`make emulate`), where kernels are compiled; elsewhere they are interpreted."""

import os

import pytest

collect_ignore_glob = [] if os.environ.get("PTX_EMULATOR") else ["test_*.py"]


@pytest.fixture(autouse=True)
def _unwritten_memory_shows(poisoned_memory: None) -> None:
    """Every test here uses the fixture."""
