"""grouped_linear and grouped_grad: all experts in one launch, compared with the definition expert by expert.

tests/test_experts.py tests what the operator promises on every backend.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from expert_problems import ExpertsProblem, make_problem, on
from kernel_cases import Guarded, far_apart
from torch import Tensor

from smoa_kernels.backends import experts_masked
from smoa_kernels.backends.triton import experts_backward, experts_forward
from smoa_kernels.definition.experts import ExpertBlocks, reference_experts_linear
from smoa_kernels.definition.partition import BlockPartition
from smoa_kernels.kernels.common import OLD_TRITON, tiles_of_segments
from smoa_kernels.kernels.grouped_linear import GROUPED_LINEAR
from smoa_kernels.kernels.spec import Key

pytestmark = pytest.mark.numerical

SHAPE = 48, 88
PARTITIONS = {
    "contiguous": lambda seed: BlockPartition.contiguous(SHAPE, 2, granule=8),
    "granules": lambda seed: BlockPartition.random(SHAPE, 2, granule=8, seed=seed),
    "coordinates": lambda seed: BlockPartition.random(SHAPE, 2, seed=seed),
    "prime": lambda seed: BlockPartition.from_labels(
        *((torch.arange(size) >= prime).int() for size, prime in zip(SHAPE, (37, 5), strict=True)), 2
    ),
    "one block": lambda seed: BlockPartition.contiguous(SHAPE, 1),
}


def problem(
    kind: str, pairs: tuple[int, ...], ranks: tuple[int, ...] = (3, 2), **given: bool
) -> ExpertsProblem:
    """Experts with blocks of their own; each has its own order if the kind has a choice."""
    partitions = [PARTITIONS[kind](seed) for seed in range(len(pairs))]
    sides = [torch.stack([getattr(p, side) for p in partitions]) for side in ("row_block", "col_block")]
    blocks = ExpertBlocks.from_labels(*sides, partitions[0].num_blocks)
    ranks = ranks[: blocks.num_blocks]
    made = make_problem(pairs=pairs, rows=SHAPE[0], cols=SHAPE[1], ranks=ranks, **given)  # type: ignore[arg-type]
    made = replace(made, adapter=replace(made.adapter, blocks=blocks))
    return on(made, made.x.device)


def results(p: ExpertsProblem) -> tuple[Tensor, ...]:
    """y, dX, dA and dB of the backend."""
    found = experts_backward(p.dy, p.x, p.ends, p.adapter, needs_x=True)
    return (experts_forward(p.x, p.ends, p.adapter), *found)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "kind", ["contiguous", *(pytest.param(kind, marks=pytest.mark.slow) for kind in [*PARTITIONS][1:])]
)
def test_blocks_of_every_kind(kind: str) -> None:
    p = problem(kind, (5, 0, 18)).to(torch.float32)
    p.assert_within_budget(results(p))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("factors", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["contiguous", "coordinates"])
def test_half_types(kind: str, dtype: torch.dtype, factors: torch.dtype | None) -> None:
    p = problem(kind, (5, 0, 18), transposed=factors is None).to(dtype, factors)
    p.assert_within_budget(results(p))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("ranks", [(0, 0), (0, 5), (1, 40), (65, 33)], ids=str)
@pytest.mark.parametrize("kind", ["contiguous", "coordinates"])
def test_ranks(kind: str, ranks: tuple[int, ...]) -> None:
    """Rank 0, and more ranks than a program handles at once."""
    p = problem(kind, (7, 2), ranks).to(torch.float32)
    p.assert_within_budget(results(p))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("pairs", [(1,), (0, 0, 1), (40, 0, 0), (1, 1, 1, 1, 1), (33, 0, 65, 1)], ids=str)
def test_pairs(pairs: tuple[int, ...]) -> None:
    """All pairs on one expert, a single pair, one pair per expert, and one pair more than full tiles."""
    p = problem("contiguous", pairs).to(torch.float32)
    p.assert_within_budget(results(p))


@pytest.mark.skipif(OLD_TRITON, reason="such a tile ships from Triton 3.9 on")
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
    p = problem("contiguous", (5, 0, 18), (20, 12)).to(torch.float32)
    p.assert_within_budget(results(p))


def test_no_pair_at_all() -> None:
    y, dx, dA, dB = results(problem("contiguous", (0, 0)).to(torch.float32))
    assert (y.shape, dx.shape) == ((0, SHAPE[0]), (0, SHAPE[1]))
    assert not dA.any()
    assert not dB.any()


@pytest.mark.slow
def test_nothing_beside_the_operands_is_touched(guarded: Guarded) -> None:
    p = problem("contiguous", (5, 0, 9)).to(torch.float32)
    a = p.adapter
    placed = replace(a, **{name: guarded(getattr(a, name), row_padding=8) for name in ("weight", "A", "B")})
    beside = replace(
        p,
        x=guarded(p.x, row_padding=8),
        dy=guarded(p.dy, row_padding=8),
        ends=guarded(p.ends),
        adapter=placed,
    )
    for ours, plain in zip(results(beside), results(p), strict=True):
        assert torch.equal(ours, plain)


def test_an_idle_experts_gradient_is_zero_whatever_its_weight_holds() -> None:
    p = problem("contiguous", (5, 0, 9)).to(torch.float32)
    p.adapter.weight[1] = float("nan")
    y, dx, dA, dB = results(p)
    assert not dA[1].any()
    assert not dB[1].any()
    for result in (y, dx, dA, dB):
        assert bool(result.isfinite().all())


@pytest.mark.slow
def test_offsets_beyond_int32() -> None:
    p = problem("contiguous", (5, 0, 9, 3)).to(torch.bfloat16)
    apart = far_apart(p.adapter.weight, 2**30)
    far = replace(p, adapter=replace(p.adapter, weight=apart))
    for ours, near in zip(results(far), results(p), strict=True):
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
