"""The machine, core/*.cpp, compiled by g++ when it is first needed and kept in the user's cache folder."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smoa_kernels.files import cache_folder

from .assembler import INSTRUCTION
from .findings import ERRORS, NOTES

__all__ = ["Library", "Region", "Report", "Stat", "library", "obstacle"]

CORE = Path(__file__).parent / "core"
FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")


class Stat(ctypes.Structure):
    """Counts of one instruction, over all warps of a launch.

    For accesses to global memory `sectors` are distinct pieces of 32 bytes that a request touches, `ideal_sectors`
    those that its bytes would fill; for shared memory `waves` are passes over its 32 banks, `phases` those without
    conflicts.
    """

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "exec",
            "lanes",
            "requests",
            "sectors",
            "ideal_sectors",
            "used_bytes",
            "waves",
            "phases",
        )
    ]


class Region(ctypes.Structure):
    """A tensor argument: the addresses that the kernel sees, its storage, and per byte who wrote and who read it."""

    _fields_ = [
        ("start", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("storage", ctypes.c_void_p),
        ("in_view", ctypes.c_void_p),
        ("writer", ctypes.c_void_p),
        ("reader", ctypes.c_void_p),
        ("poison", ctypes.c_uint32),
    ]


class Report(ctypes.Structure):
    """One example of a finding."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("kind", "pc", "cta", "warp", "lane", "width")),
        *((name, ctypes.c_uint64) for name in ("address", "region", "other")),
    ]


@dataclass(frozen=True)
class Library:
    """The compiled machine.

    Attributes:
        launch: runs a program over a grid (`core/core.cpp`).
        operations: the number of each operation by name.
        kinds: names of the kinds of findings, by number.
        shared_base: the address at which a program's shared memory begins.
        wgmma_forms: the forms of operands that wgmma instructions had so far, as bits.
    """

    launch: Any
    operations: Mapping[str, int]
    kinds: tuple[str, ...]
    shared_base: int
    wgmma_forms: Any


def obstacle() -> str | None:
    """Why the emulator cannot run here; None where it can."""
    if shutil.which("g++") is None:
        return "there is no g++, which compiles the emulator"
    return None


@functools.cache
def library() -> Library:
    """Compile what changed and load it.

    Raises:
        RuntimeError: there is no g++.
    """
    if (reason := obstacle()) is not None:
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
    for name in ("emu_op_name", "emu_kind_name"):
        getattr(loaded, name).restype = ctypes.c_char_p
    loaded.emu_wgmma_seen.restype = ctypes.c_uint64
    kinds = tuple(loaded.emu_kind_name(i).decode().lower() for i in range(loaded.emu_kinds()))
    assert set(kinds) == {*ERRORS, *NOTES}
    assert loaded.emu_ins_size() == INSTRUCTION.itemsize
    operations = {loaded.emu_op_name(i).decode(): i for i in range(loaded.emu_ops())}
    return Library(loaded.emu_launch, operations, kinds, loaded.emu_shared_base(), loaded.emu_wgmma_seen)
