"""Runs a pytest session over the code of another processor; tests/conftest.py loads it where CPU_EMULATOR names one."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from smoa_kernels.backends.native import library

from .build import HERE, compile_library, obstacle

PROCESSOR = os.environ["CPU_EMULATOR"]

if (REASON := obstacle()) is None:
    # The session's other processes find what the first of them compiled.
    if "CPU_EMULATOR_FOLDER" not in os.environ:
        folder = os.environ["CPU_EMULATOR_FOLDER"] = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, folder)
        compile_library(PROCESSOR, Path(folder))
    library._FOLDER = Path(os.environ["CPU_EMULATOR_FOLDER"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if REASON is not None:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=REASON))


def pytest_report_header() -> str:
    return f"emulated: {PROCESSOR}, on {HERE}"
