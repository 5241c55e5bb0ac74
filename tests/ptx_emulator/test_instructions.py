"""Single instructions that are easy to get wrong: NaN, shifts by more than the width, signs, saturation."""

import numpy as np
import pytest
import torch

from .handwritten import run_ptx

pytestmark = pytest.mark.smoke

NAN, INFINITE, ONE, TWO = 0x7FC00000, 0x7F800000, 0x3F800000, 0x40000000
MINUS = 0xFFFFFFFF

BODY = """
	ld.param.b64 %rd1, [p0];
	mul.wide.u32 %rd2, %r1, 4;
	add.s64 %rd3, %rd1, %rd2;
	mov.b32 %r3, {a};
	mov.b32 %r4, {b};
{text}
	st.global.b32 [%rd3], %r5;
"""


def compared(comparison: str) -> str:
    return f"setp.{comparison} %p1, %r3, %r4;\n\tselp.b32 %r5, 1, 0, %p1;"


@pytest.mark.parametrize(
    ("text", "a", "b", "expected"),
    [
        # Comparisons with NaN are false, except those that end in u.
        (compared("ne.f32"), NAN, ONE, 0),
        (compared("ne.f32"), TWO, ONE, 1),
        (compared("neu.f32"), NAN, ONE, 1),
        (compared("eq.f32"), NAN, NAN, 0),
        (compared("equ.f32"), NAN, NAN, 1),
        (compared("gt.f32"), NAN, ONE, 0),
        (compared("gtu.f32"), NAN, ONE, 1),
        (compared("gtu.f32"), ONE, TWO, 0),
        (compared("lt.s32"), MINUS, 1, 1),
        (compared("lt.u32"), MINUS, 1, 0),
        ("max.f32 %r5, %r3, %r4;", NAN, ONE, ONE),
        ("max.NaN.f32 %r5, %r3, %r4;", ONE, NAN, NAN),
        # Shifts
        ("shl.b32 %r5, %r3, %r4;", 5, 32, 0),
        ("shr.s32 %r5, %r3, %r4;", 0x80000000, 40, MINUS),
        ("shr.u32 %r5, %r3, %r4;", 0x80000000, 31, 1),
        # Parts
        ("prmt.b32 %r5, %r3, %r4, 0x5410;", 0x11112222, 0x33334444, 0x44442222),
        ("prmt.b32 %r5, %r3, %r4, 0x8888;", 0x80, 0, MINUS),
        ("bfe.s32 %r5, %r3, 4, 4;", 0xF0, 0, MINUS),
        ("bfe.u32 %r5, %r3, 28, 8;", 0xF0000000, 0, 0xF),
        ("mov.b32 {%rs1, %rs2}, %r3;\n\tmov.b32 %r5, {%rs2, %rs1};", 0x12345678, 0, 0x56781234),
        # Integers
        ("div.s32 %r5, %r3, %r4;", MINUS - 6, 2, MINUS - 2),
        ("rem.s32 %r5, %r3, %r4;", MINUS - 6, 2, MINUS),
        ("div.s32 %r5, %r3, %r4;", 0x80000000, MINUS, 0x80000000),
        ("mul.hi.s32 %r5, %r3, %r4;", MINUS, 2, MINUS),
        ("mul.hi.u32 %r5, %r3, %r4;", MINUS, 2, 1),
        ("abs.s32 %r5, %r3;", MINUS - 6, 0, 7),
        ("cvt.s8.s32 %rs1, %r3;\n\tcvt.s32.s8 %r5, %rs1;", 0x180, 0, MINUS - 0x7F),
        # Conversions: to nearest even, saturated, 0 for NaN
        ("cvt.rzi.s32.f32 %r5, %r3;", 0xBFC00000, 0, MINUS),
        ("cvt.rzi.s32.f32 %r5, %r3;", INFINITE, 0, 0x7FFFFFFF),
        ("cvt.rzi.u32.f32 %r5, %r3;", 0xBF800000, 0, 0),
        ("cvt.rzi.s32.f32 %r5, %r3;", NAN, 0, 0),
        ("cvt.rn.bf16x2.f32 %r5, %r3, %r4;", 0x3F808000, 0x3F818000, 0x3F803F82),
        ("cvt.rn.f16x2.f32 %r5, %r3, %r4;", 0x47800000, ONE, 0x7C003C00),
        ("cvt.rna.tf32.f32 %r5, %r3;", 0x3F801000, 0, 0x3F802000),
        # One rounding, not two
        ("fma.rn.f32 %r5, %r3, %r3, 0fbF800002;", 0x3F800001, 0, 0x28800000),
    ],
)
def test_instruction(text: str, a: int, b: int, expected: int) -> None:
    out = torch.zeros(32, dtype=torch.int32)
    run_ptx(BODY.format(a=a, b=b, text=text), out)
    assert set(out.numpy().view(np.uint32).tolist()) == {expected}, [hex(v) for v in set(out.tolist())]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("shfl.sync.bfly.b32 %r5, %r1, 3, 31, -1;", [lane ^ 3 for lane in range(32)]),
        (
            "shfl.sync.up.b32 %r5, %r1, 2, 0, -1;",
            [max(lane - 2, 0) if lane >= 2 else lane for lane in range(32)],
        ),
        ("shfl.sync.down.b32 %r5, %r1, 2, 31, -1;", [lane + 2 if lane < 30 else lane for lane in range(32)]),
        ("shfl.sync.idx.b32 %r5, %r1, 7, 31, -1;", [7] * 32),
        ("redux.sync.add.s32 %r5, %r1, -1;", [496] * 32),
    ],
)
def test_between_lanes(text: str, expected: list[int]) -> None:
    out = torch.zeros(32, dtype=torch.int32)
    run_ptx(BODY.format(a=0, b=0, text=text), out)
    assert out.tolist() == expected
