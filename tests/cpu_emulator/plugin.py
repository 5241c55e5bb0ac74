"""Runs a pytest session with another processor's code; tests/conftest.py loads it if CPU_EMULATOR names one."""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch_calls import on_threads

from smoa_kernels.backends.native import library

from .arm import load
from .build import HERE, PROCESSORS, compile_library, unsupported_reason

PROCESSOR = os.environ["CPU_EMULATOR"]
if PROCESSOR not in PROCESSORS:
    raise pytest.UsageError(f"CPU_EMULATOR must be one of {', '.join(PROCESSORS)}, got {PROCESSOR}")

if (REASON := unsupported_reason(PROCESSOR)) is None:
    # The session's first process compiles for the others.
    if "CPU_EMULATOR_FOLDER" not in os.environ:
        folder = os.environ["CPU_EMULATOR_FOLDER"] = tempfile.mkdtemp(prefix="cpu-emulator-")
        atexit.register(shutil.rmtree, folder)
        compile_library(PROCESSOR, Path(folder))
    library._FOLDER = Path(os.environ["CPU_EMULATOR_FOLDER"])
    if PROCESSOR == "neon":
        library.instruction_set = lambda: "NEON"
        library.ctypes = SimpleNamespace(**vars(ctypes) | {"CDLL": load})
    library.allowed = lambda: PROCESSORS[PROCESSOR]
    with on_threads(2):
        assert library.unsupported_reason() is None, library.unsupported_reason()
    features = library.has("bf16"), library.has("amx")
    assert features == PROCESSORS[PROCESSOR], "the compiler leaves features out"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if REASON is not None:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=REASON))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    said = f"emulated: {PROCESSOR}, on {HERE}" if REASON is None else f"nothing emulated: {REASON}"
    terminalreporter.write_line(said)
