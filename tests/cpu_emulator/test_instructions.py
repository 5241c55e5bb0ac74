"""The emulated processors: known results of instructions (check.c), and misuse that the emulator must detect."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from hatch_build import FOLDER
from smoa_kernels.backends.native.library import Call

from . import arm
from .build import compile_program, unsupported_reason

of_x86 = pytest.mark.skipif(unsupported_reason() is not None, reason=str(unsupported_reason()))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("check") / "check"
    compile_program(str(Path(__file__).parent / "check.c"), "-o", str(output))
    return output


@of_x86
def test_known_results(program: Path) -> None:
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.stdout == "right\n", done.stderr


@of_x86
@pytest.mark.parametrize(
    ("misuse", "found"),
    [
        ("a", "a line does not begin at a multiple of 64 bytes"),
        ("l", "a line does not begin at a multiple of 64 bytes"),
        ("t", "a tile that has no size"),
        ("r", "a tile that has no size"),  # after the tiles' release
        ("f", "tiles whose sizes do not fit"),
        ("s", "one tile twice in a product"),
        ("c", "a size that no tile has"),
    ],
)
def test_misuse_is_found(program: Path, misuse: str, found: str) -> None:
    done = subprocess.run([program, misuse], capture_output=True, text=True)
    assert done.returncode < 0
    assert done.stderr == f"emulated processor: {found}\n"


# ARM: operands and results are copied to qemu, and an access beyond an operand stops it

PROGRAM = """
#include "operand.h"
i64 smoa_mask(const call *c) { return ((uint16_t *)c->y)[c->seed] += 1; }
"""


@pytest.mark.skipif(arm.unsupported_reason() is not None, reason=str(arm.unsupported_reason()))
def test_operands_are_copied_and_end_where_they_end(tmp_path: Path) -> None:
    source, library = tmp_path / "source.c", tmp_path / "linear_neon.so"
    source.write_text(PROGRAM)
    flags = ["-shared", "-fPIC", "-w", "-DVECTOR_BYTES=16", f"-I{FOLDER}"]
    subprocess.run([arm.CC, *flags, source, "-o", library], check=True)
    arm.compile_program(tmp_path)
    emulated, y = arm.load(str(library)), torch.arange(6, dtype=torch.int16)
    call = Call(tokens=3, y=y.data_ptr(), seed=5)
    call.layer.cols = 17  # two words a token
    assert emulated.smoa_mask(ctypes.byref(call)) == 6
    assert y.tolist() == [0, 1, 2, 3, 4, 6]
    call.seed = 6
    with pytest.raises(AssertionError, match="smoa_mask stopped in qemu"):
        emulated.smoa_mask(ctypes.byref(call))
