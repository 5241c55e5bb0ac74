"""Warpgroup products: Triton's kernels against float64, and single instructions in every form against exact sums."""

import re

import pytest
import torch
import triton
from torch import Tensor

from . import ARCH, emulator
from .handwritten_wgmma import KINDS, Operand, run_wgmma
from .samples import matmul, matmul_chained, matmul_computed
from .sums import cut_off

pytestmark = pytest.mark.skipif(ARCH != 90, reason="only sm_90 has wgmma")

DTYPES = [(torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "tf32")]
each_dtype = pytest.mark.parametrize(("dtype", "precision"), DTYPES, ids=["fp16", "bf16", "tf32"])
TILES = [
    (4, (64, 64, 32)),
    (8, (128, 128, 32)),
    (4, (64, 256, 32)),
    (8, (128, 64, 64)),
    (4, (128, 16, 64)),
    (4, (64, 32, 16)),
]


def error_of(found: Tensor, truth: Tensor) -> float:
    """Relative error; also checks that Triton used wgmmas of a single shape and that nothing was found."""
    launch = emulator.launches[-1]
    shapes = {re.search(r"m64n\d+k\d+", text) for text in launch.program.texts if "wgmma.mma" in text}
    assert len({match and match[0] for match in shapes}) == 1
    assert not launch.findings
    return float((found - truth).norm() / truth.norm())


def stored(t: Tensor, transposed: bool) -> Tensor:
    return t.T.contiguous().T if transposed else t


@each_dtype
@pytest.mark.parametrize(("warps", "tile"), TILES)
@pytest.mark.parametrize(
    ("stages", "layout"),
    [(1, "nn"), (1, "tt"), (3, "nn"), (3, "tt"), (3, "nt"), (3, "tn"), (4, "nn"), (4, "tt")],
)
def test_products(
    dtype: torch.dtype, precision: str, warps: int, tile: tuple[int, int, int], stages: int, layout: str
) -> None:
    # Sizes that are no multiple of a tile; the second triple allows asynchronous copies of the operands.
    M, N, K = (130, 150, 170) if stages == 1 else (136, 264, 192)
    a = stored(torch.randn(M, K).to(dtype), layout[0] == "t")
    b = stored(torch.randn(K, N).to(dtype), layout[1] == "t")
    c = torch.empty(M, N)
    grid = (triton.cdiv(M, tile[0]) * triton.cdiv(N, tile[1]),)
    sizes = M, N, K, *a.stride(), *b.stride(), *c.stride(), *tile
    matmul[grid](a, b, c, *sizes, precision, 2, num_warps=warps, num_stages=stages)
    assert error_of(c, cut_off(a).double() @ cut_off(b).double()) < 1e-6


@each_dtype
@pytest.mark.parametrize(
    ("warps", "stages", "n", "layout"),
    [
        (4, 1, 64, "n"),
        (4, 3, 64, "t"),
        (8, 3, 128, "n"),
        (8, 4, 128, "t"),
        (4, 3, 256, "n"),
        (4, 1, 256, "t"),
    ],
)
def test_computed_operand(
    dtype: torch.dtype, precision: str, warps: int, stages: int, n: int, layout: str
) -> None:
    """With a left operand in registers."""
    a, b = torch.randn(128, 128).to(dtype), stored(torch.randn(128, n).to(dtype), layout == "t")
    c = torch.empty(128, n)
    sizes = *a.stride(), *b.stride(), 0.7, n, 128, 16 * warps, 32
    matmul_computed[(128 // (16 * warps),)](a, b, c, *sizes, precision, num_warps=warps, num_stages=stages)
    left = (a.float() * torch.tensor(0.7)).to(dtype)
    assert error_of(c, cut_off(left).double() @ cut_off(b).double()) < 1e-6


@each_dtype
def test_chained_products(dtype: torch.dtype, precision: str) -> None:
    a, b, c = torch.randn(64, 32).to(dtype), torch.randn(32, 64).to(dtype), torch.randn(64, 32).to(dtype)
    out = torch.empty(64, 32)
    matmul_chained[(1,)](a, b, c, out, 64, 64, 32, precision, num_warps=4)
    first = cut_off((cut_off(a).double() @ cut_off(b).double()).to(dtype))
    truth = first.double() @ cut_off(c).double()
    assert float((out - truth).norm() / truth.norm()) < (1e-5 if dtype == torch.float32 else 2e-3)


def integers(*shape: int) -> Tensor:
    return torch.randint(-4, 5, shape).float()


FORMS = [
    pytest.param(kind, n, left, right, id=f"{kind}-{n}-{name}-{width}-{'MN' if major else 'K'}")
    for kind in KINDS
    for n in (8, 24, 64, 256)
    for width in (16, 32, 64, 128)
    for major in ((False, True) if kind != "tf32" else (False,))
    for name, left, right in (
        ("left", Operand(width, major), Operand()),
        ("right", None, Operand(width, major)),
    )
]


@pytest.mark.parametrize(("kind", "n", "left", "right"), FORMS)
def test_every_form(kind: str, n: int, left: Operand | None, right: Operand) -> None:
    """All swizzles and contiguous dimensions, and a left operand in registers."""
    depth = KINDS[kind][1]
    a, b = integers(64, depth), integers(depth, n)
    out, launch = run_wgmma(kind, a, b, left=left, right=right)
    assert torch.equal(out, a @ b)
    assert not launch.findings


@pytest.mark.parametrize(("scale_d", "added"), [("%p2", 3.0), ("0", 0.0)])
def test_accumulators(scale_d: str, added: float) -> None:
    a, b = integers(64, 16), integers(16, 32)
    out, _ = run_wgmma("f16", a, b, scale_d=scale_d, start=3.0)
    assert torch.equal(out, a @ b + added)


@pytest.mark.parametrize("signs", [(-1, 1), (1, -1), (-1, -1)])
def test_signs(signs: tuple[int, int]) -> None:
    a, b = integers(64, 16), integers(16, 32)
    out, _ = run_wgmma("bf16", a, b, signs=signs)
    assert torch.equal(out, a @ b * signs[0] * signs[1])
