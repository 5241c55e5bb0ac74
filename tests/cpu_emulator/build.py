"""Compiles backends/native for other processors; immintrin.h and qemu emulate their instructions."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import torch

import hatch_build
from hatch_build import FOLDER, SOURCE, compiler, digest_of

from . import arm

PROCESSORS = {
    "avx512": (False, False),
    "avx512bf16": (True, False),
    "amx": (True, True),
    "neon": (False, False),
}
"""Whether each has AVX512-BF16, and AMX."""
FLAGS = ["-O1", "-fexpensive-optimizations", "-w", "-Wno-psabi", "-mavx2", "-mfma", "-mf16c"]
"""-O1 halves the compile time of a wheel's -O3; -fexpensive-optimizations lets GCC fuse products and sums."""
HERE = torch.backends.cpu.get_cpu_capability()
FOR_ARM = {"CC": arm.CC, "_PYTHON_HOST_PLATFORM": "linux-aarch64"}


def unsupported_reason(processor: str = "amx") -> str | None:
    """Why a processor cannot be emulated here, or None if it can."""
    if processor == "neon":
        return arm.unsupported_reason()
    if compiler() is None or platform.machine() != "x86_64":
        return "needs Linux on an x86 processor, and a C compiler"
    return None if HERE.startswith("AVX") else "needs a processor with AVX2"


def compile_program(*arguments: str) -> None:
    """Compiles with the emulated instructions.

    Raises:
        CalledProcessError: the compiler failed, and has printed why.
    """
    subprocess.run([*(compiler() or []), *FLAGS, f"-I{Path(__file__).parent}", *arguments], check=True)


def compile_library(processor: str, into: Path) -> None:
    """Writes sources and library to a folder, named as library.py expects on the actual processor."""
    sources = [Path(shutil.copy2(source, into)) for source in sorted(FOLDER.glob("*.[ch]"))]
    if processor == "neon":
        with mock.patch.dict(os.environ, FOR_ARM):
            assert hatch_build.compile_library(into)
        arm.compile_program(into)
        return
    features = ["-DVECTOR_BYTES=64", f'-DSOURCE="{digest_of(sources)}"']
    output = into / f"linear_{HERE.lower()}.so"
    # A missing instruction of immintrin.h is an error here, not on loading.
    compile_program("-shared", "-fPIC", "-Wl,-z,defs", *features, str(SOURCE), "-o", str(output))
