"""The machine, core/*.cpp, compiled by g++ on first use and cached in the user's cache folder."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smoa_kernels.files import cache_folder

from .assembler import Instruction
from .findings import ERRORS, NOTES

CORE = Path(__file__).parent / "core"
FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")


_u32, _u64, _pointer = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p


class Stat(ctypes.Structure):
    """Counts of an instruction over all warps of a launch: requests to global memory, and 32-byte pieces they touch."""

    _fields_ = [("requests", _u64), ("sectors", _u64)]


class Region(ctypes.Structure):
    """A tensor argument: its addresses in the kernel, its storage, and the last writer and reader of each byte."""

    _fields_ = [
        *((name, _u64) for name in ("start", "size")),
        *((name, _pointer) for name in ("storage", "in_view", "writer", "reader")),
        ("poison", _u32),
    ]


class Report(ctypes.Structure):
    """One example of a finding."""

    _fields_ = [
        *((name, _u32) for name in ("kind", "pc", "cta", "warp", "lane", "width")),
        *((name, _u64) for name in ("address", "region", "other")),
    ]


class Job(ctypes.Structure):
    """A launch; core/machine.h explains the fields."""

    _fields_ = [
        ("code", _pointer),
        *((name, _u32) for name in ("size", "register_bytes", "predicates")),
        *((name, _pointer) for name in ("registers", "initial_predicates", "special", "extra")),
        ("grid", _u32 * 3),
        *((name, _u32) for name in ("threads", "shared_size")),
        *((name, _pointer) for name in ("parameters", "regions")),
        *((name, _u32) for name in ("region_count", "hopper", "wgmma")),
        *((name, _pointer) for name in ("stats", "reports")),
        *((name, _u32) for name in ("most_reports", "report_count")),
        ("kind_counts", _pointer),
        ("error", ctypes.c_char * 512),
    ]


@dataclass(frozen=True)
class Library:
    """The compiled machine.

    Attributes:
        launch: runs a `Job`; returns whether it stopped.
        operations: the number of each operation by name.
        kinds: names of the kinds of findings, by number.
        shared_base: the address where a program's shared memory begins.
    """

    launch: Callable[[Any], int]
    operations: Mapping[str, int]
    kinds: tuple[str, ...]
    shared_base: int


def unsupported_reason() -> str | None:
    """Why the emulator cannot run here, or None if it can."""
    if shutil.which("g++") is None:
        return "there is no g++, which compiles the emulator"
    return None


@functools.cache
def library() -> Library:
    """Compile the machine if its sources changed, and load it.

    Raises:
        RuntimeError: there is no g++.
    """
    if (reason := unsupported_reason()) is not None:
        raise RuntimeError(reason)
    sources = sorted(CORE.iterdir())
    key = hashlib.sha256(" ".join(FLAGS).encode() + b"".join(path.read_bytes() for path in sources))
    target = cache_folder() / "ptx_emulator" / f"core-{key.hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        building = target.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", *FLAGS, "-o", str(building), str(CORE / "core.cpp")], check=True)
        building.replace(target)
    loaded = ctypes.CDLL(str(target))
    for name in ("emu_operation_name", "emu_kind_name"):
        getattr(loaded, name).restype = ctypes.c_char_p
    kinds = tuple(loaded.emu_kind_name(i).decode().lower() for i in range(loaded.emu_kinds()))
    assert set(kinds) == {*ERRORS, *NOTES}
    assert loaded.emu_instruction_size() == ctypes.sizeof(Instruction)
    assert loaded.emu_job_size() == ctypes.sizeof(Job)
    operations = {loaded.emu_operation_name(i).decode(): i for i in range(loaded.emu_operations())}
    return Library(loaded.emu_launch, operations, kinds, loaded.emu_shared_base())
