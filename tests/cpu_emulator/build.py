"""Compiles backends/native for another processor; immintrin.h here emulates its instructions."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import torch

from hatch_build import FOLDER, SOURCE, compiler, digest_of

PROCESSORS = {
    "avx512": {"EMULATES_BF16": 0, "EMULATES_AMX": 0},
    "avx512bf16": {"EMULATES_BF16": 1, "EMULATES_AMX": 0},
    "amx": {"EMULATES_BF16": 1, "EMULATES_AMX": 1},
}
FLAGS = [
    "-O1",
    "-fexpensive-optimizations",
    "-w",
    "-Wno-psabi",
    "-mavx2",
    "-mfma",
    "-mf16c",
    f"-I{Path(__file__).parent}",
]
"""-O1 halves the compile time of a wheel's -O3; -fexpensive-optimizations lets GCC fuse products and sums."""
HERE = torch.backends.cpu.get_cpu_capability()


def obstacle() -> str | None:
    """Why nothing can be emulated here, or None if it can."""
    if compiler() is None:
        return "needs Linux on an x86 processor, and a C compiler"
    return None if HERE.startswith("AVX") else "needs a processor with AVX2"


def compile_program(processor: str, *arguments: str) -> None:
    """Compiles with a processor's features.

    Raises:
        KeyError: no such processor.
        CalledProcessError: the compiler failed, and has printed why.
    """
    features = [f"-D{name}={value}" for name, value in PROCESSORS[processor].items()]
    subprocess.run([*(compiler() or []), *FLAGS, *features, *arguments], check=True)


def compile_library(processor: str, into: Path) -> None:
    """Writes sources and library to a folder, named as library.py expects on the actual processor."""
    sources = [Path(shutil.copy2(source, into)) for source in sorted(FOLDER.glob("*.[ch]"))]
    features = ["-DVECTOR_BYTES=64", f'-DSOURCE="{digest_of(sources)}"']
    output = into / f"linear_{HERE.lower()}.so"
    # A missing instruction of immintrin.h is an error here, not on loading.
    compile_program(processor, "-shared", "-fPIC", "-Wl,-z,defs", *features, str(SOURCE), "-o", str(output))
