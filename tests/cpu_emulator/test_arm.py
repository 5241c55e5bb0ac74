"""The emulated ARM: a function's operands and results are copied, and an access beyond an operand stops it."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from hatch_build import FOLDER
from smoa_kernels.backends.native.library import Call

from . import arm

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
