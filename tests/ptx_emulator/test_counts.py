"""Sectors and bank conflicts of accesses that can be counted by hand."""

import pytest
import torch

from .handwritten import run_ptx

pytestmark = pytest.mark.smoke

LDMATRIX = "ldmatrix.sync.aligned.m8n8"
SHARED = [
    (4, "ld.shared.b32 %r5, [%r4]", (1, 1)),
    (8, "ld.shared.b32 %r5, [%r4]", (2, 1)),
    (128, "ld.shared.b32 %r5, [%r4]", (32, 1)),
    (0, "ld.shared.b32 %r5, [%r4]", (1, 1)),
    (132, "ld.shared.b32 %r5, [%r4]", (1, 1)),
    (2, "ld.shared.b16 %rs5, [%r4]", (1, 1)),
    (8, "ld.shared.v2.b32 {%r5,%r6}, [%r4]", (2, 2)),
    (16, "ld.shared.v4.b32 {%r5,%r6,%r7,%r8}, [%r4]", (4, 4)),
    (32, "ld.shared.v4.b32 {%r5,%r6,%r7,%r8}, [%r4]", (8, 4)),
    (128, "st.shared.v4.b32 [%r4], {%r1,%r1,%r1,%r1}", (32, 4)),
    (128, f"{LDMATRIX}.x4.shared.b16 {{%r5,%r6,%r7,%r8}}, [%r4]", (32, 4)),
    (144, f"{LDMATRIX}.x4.shared.b16 {{%r5,%r6,%r7,%r8}}, [%r4]", (4, 4)),
    (16, f"{LDMATRIX}.x2.shared.b16 {{%r5,%r6}}, [%r4]", (2, 2)),
]
GLOBAL = [
    (4, "ld.global.b32 %r5, [%rd3]", 0, (4, 128)),
    (4, "ld.global.b32 %r5, [%rd3]", 4, (5, 128)),
    (8, "ld.global.b32 %r5, [%rd3]", 0, (8, 128)),
    (0, "ld.global.b32 %r5, [%rd3]", 0, (1, 4)),
    (64, "ld.global.b32 %r5, [%rd3]", 0, (32, 128)),
    (16, "ld.global.v4.b32 {%r5,%r6,%r7,%r8}, [%rd3]", 0, (16, 512)),
]


@pytest.mark.parametrize(("stride", "access", "expected"), SHARED)
def test_shared_memory(stride: int, access: str, expected: tuple[int, int]) -> None:
    """Passes over the banks, and passes without conflicts."""
    launch = run_ptx(f"mul.lo.s32 %r3, %r1, {stride};\nadd.s32 %r4, %r2, %r3;\n{access};")
    stat = launch.stats[-3]  # the last two are the end instructions
    assert (stat["waves"], stat["phases"]) == expected


@pytest.mark.parametrize(("stride", "access", "offset", "expected"), GLOBAL)
def test_global_memory(stride: int, access: str, offset: int, expected: tuple[int, int]) -> None:
    """Sectors, and bytes used."""
    x = torch.zeros(4096)
    start = offset - x.data_ptr() % 32 + 32
    launch = run_ptx(
        f"ld.param.b64 %rd1, [p0];\nmul.wide.u32 %rd2, %r1, {stride};\nadd.s64 %rd3, %rd1, %rd2;\n"
        f"add.s64 %rd3, %rd3, {start};\n{access};",
        x,
    )
    stat = launch.stats[-3]
    assert (stat["sectors"], stat["used_bytes"]) == expected
