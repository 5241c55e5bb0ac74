"""grouped_linear and grouped_grad: all experts in one launch, compared with the definition expert by expert.

tests/test_experts.py tests what the operator promises on every backend.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
from expert_problems import ExpertsProblem, make_problem
from kernel_cases import Guarded, far_apart

from smoa_kernels.backends import experts_masked
from smoa_kernels.definition.experts import reference_experts_linear
from smoa_kernels.kernels.common import tiles_of_segments
from smoa_kernels.kernels.grouped_linear import GROUPED_LINEAR
from smoa_kernels.kernels.spec import Key, release

pytestmark = pytest.mark.numerical


COMMON = "contiguous granules"


def problem(pairs: tuple[int, ...], ranks: tuple[int, ...] = (3, 2), blocks: str = COMMON) -> ExpertsProblem:
    return make_problem(pairs=pairs, rows=48, cols=88, ranks=ranks, blocks=blocks)


@pytest.mark.parametrize(
    "blocks", [COMMON, *(pytest.param(other, marks=pytest.mark.slow) for other in ("own", "granules"))]
)
def test_results_are_within_their_budget(blocks: str) -> None:
    p = problem((5, 0, 18), blocks=blocks).to(torch.float32)
    p.assert_within_budget(p.operator("triton"))


@pytest.mark.skipif(release(triton.__version__) < (3, 7), reason="such a tile ships from Triton 3.7 on")
def test_wide_tiles_take_few_ranks() -> None:
    """A tile of 256 pairs has registers for at most 16 ranks."""
    key = Key("grouped_linear", "bf16", 16, 2, 1024, 2048, 512, granule=8)
    tiles = [
        GROUPED_LINEAR.default(key._replace(rank=rank, tokens=pairs), "sm_90", 132)
        for rank, pairs in ((16, 512), (17, 512), (16, 256))
    ]
    assert [vars(tile)["block_t"] for tile in tiles] == [256, 128, 128]


def test_partial_results_are_bounded() -> None:
    """Float32 rows of rank 20 exceed an eighth of W0, so each expert gets its own launch."""
    p = problem((5, 0, 18), (20, 12)).to(torch.float32)
    p.assert_within_budget(p.operator("triton"))


@pytest.mark.slow
def test_nothing_beside_the_operands_is_touched(guarded: Guarded) -> None:
    p = problem((5, 0, 9)).to(torch.float32)
    a = p.adapter
    placed = replace(a, **{name: guarded(getattr(a, name), row_padding=8) for name in ("weight", "A", "B")})
    x, dy = guarded(p.x, row_padding=8), guarded(p.dy, row_padding=8)
    beside = replace(p, x=x, dy=dy, ends=guarded(p.ends), adapter=placed)
    for ours, plain in zip(beside.operator("triton"), p.operator("triton"), strict=True):
        assert torch.equal(ours, plain)


def test_an_idle_experts_gradient_is_zero_whatever_its_weight_holds() -> None:
    p = problem((5, 0, 9)).to(torch.float32)
    p.adapter.weight[1] = float("nan")
    y, dx, dA, dB = p.operator("triton")
    assert not dA[1].any()
    assert not dB[1].any()
    for result in (y, dx, dA, dB):
        assert bool(result.isfinite().all())


@pytest.mark.slow
def test_offsets_beyond_int32() -> None:
    p = problem((5, 0, 9, 3)).to(torch.bfloat16)
    apart = far_apart(p.adapter.weight, 2**30)
    far = replace(p, adapter=replace(p.adapter, weight=apart))
    for ours, near in zip(far.operator("triton"), p.operator("triton"), strict=True):
        assert torch.equal(ours, near)


def test_masked_experts_sum_beyond_the_range_of_float16() -> None:
    e = make_problem(pairs=(30, 0, 40, 7)).to(torch.float16, torch.float32)
    e = replace(e, x=e.x * 300, dy=e.dy * 300)
    _, *found = experts_masked.experts_backward(e.dy, e.x, e.ends, e.adapter, needs_x=False)
    _, _, *exact = e.to(torch.float64).run(reference_experts_linear)
    for gradient, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(gradient.double(), truth, rtol=1e-4, atol=1e-5 * float(truth.abs().max()))


def test_tiles_of_segments() -> None:
    """The count is an upper bound for all lengths, and some lengths reach it."""
    assert tiles_of_segments(0, 4, 16) == 0
    assert tiles_of_segments(3, 128, 16) == 3
    for length, segments, block in ((17, 3, 16), (64, 4, 16), (100, 7, 8)):
        ends = [1] * (segments - 1)
        sizes = [*ends, length - sum(ends)]
        assert tiles_of_segments(length, segments, block) == sum(-(-size // block) for size in sizes)
