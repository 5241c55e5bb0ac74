"""The paper's theorems about the update, and their consequences, in float64.

The eager backend is tested, with random labels, empty blocks, blocks of rank 0, and rubbish in the factors' padding.
tests/peft/test_tuner.py compares K = 1 with PEFT's HiRA.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from draws import assume, given, settings, st
from fuzzed import problems
from problems import DEVICE, LinearProblem
from torch import Tensor

from smoa_kernels import BlockPartition
from smoa_kernels.backends import eager
from smoa_kernels.definition.ranks import trainable_parameters

pytestmark = pytest.mark.numerical

FLOAT64 = (torch.float64,)
SOME = settings(max_examples=100, deadline=None)


def delta(p: LinearProblem) -> Tensor:
    return eager.delta_weight(p.adapter())


def rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix)) if matrix.numel() else 0


def of_rank(shape: tuple[int, int], inner: int, generator: torch.Generator, *, whole: bool) -> Tensor:
    """A product of two factors. `whole` draws integers from -1 to 1, for which a float64 SVD finds the exact rank."""

    def factor(*size: int) -> Tensor:
        if whole:
            return torch.randint(-1, 2, size, generator=generator, device="cpu").double()
        return randn(*size, generator=generator)

    return factor(shape[0], inner).to(DEVICE) @ factor(inner, shape[1]).to(DEVICE)


def randn(*size: int, generator: torch.Generator) -> Tensor:
    """Drawn on the CPU, so that every device gets the same numbers."""
    return torch.randn(*size, generator=generator, dtype=torch.float64, device="cpu").to(DEVICE)


def rank_bound(p: LinearProblem) -> int:
    """`Σ min(r_k · rank(W0_k), N_k, C_k)`."""
    blocks = [
        (p.weight[p.partition.row_block == k][:, p.partition.col_block == k], r)
        for k, r in enumerate(p.ranks.tolist())
    ]
    return sum(min(r * rank(block), *block.shape) for block, r in blocks)


@settings(max_examples=200, deadline=None)
@given(p=problems(FLOAT64), inner=st.integers(1, 6), whole=st.booleans())
def test_rank_is_bounded_by_the_blocks_and_generically_equal(
    p: LinearProblem, inner: int, whole: bool
) -> None:
    """Integer factors and W0 take few values, so some rows coincide and some columns vanish."""
    generator = torch.Generator().manual_seed(inner)
    (N, C), (rho, _) = p.weight.shape, p.A.shape
    p = replace(p, weight=of_rank((N, C), inner, generator, whole=whole))
    if whole:
        A, B = (of_rank(shape, 2, generator, whole=True) for shape in ((rho, C), (N, rho)))
        assert rank(delta(replace(p, A=A, B=B))) <= rank_bound(p)
    else:
        assert rank(delta(p)) == rank_bound(p)


@SOME
@given(p=problems(FLOAT64))
def test_the_update_depends_on_every_parameter(p: LinearProblem) -> None:
    """`Σ r_k (N_k + C_k)` is the number of factor entries that change ΔW."""
    sizes = zip(p.partition.row_sizes, p.partition.col_sizes, p.ranks.tolist(), strict=True)
    A, B = p.A.clone().requires_grad_(), p.B.clone().requires_grad_()
    direction = randn(*p.weight.shape, generator=torch.Generator().manual_seed(1))
    (delta(replace(p, A=A, B=B)) * direction).sum().backward()
    # A block without rows or columns has factors that change nothing.
    counted = sum(r * (n + c) for n, c, r in sizes if n and c)
    assert int((A.grad != 0).sum() + (B.grad != 0).sum()) == counted
    assert trainable_parameters(p.partition, p.ranks.tolist()) >= counted


@SOME
@given(p=problems(FLOAT64))
def test_the_update_never_leaves_the_diagonal_blocks(p: LinearProblem) -> None:
    """The update is exactly zero outside the blocks, and merging keeps every bit there."""
    inside = p.partition.row_block[:, None] == p.partition.col_block
    outside = delta(p)[~inside]
    assert torch.equal(outside, torch.zeros_like(outside))
    assert torch.equal(eager.modulated_weight(p.adapter())[~inside], p.weight[~inside])
    adapted = p.ranks[p.partition.row_block.long()] > 0
    assert bool((delta(p)[inside & adapted[:, None]] != 0).all())


@pytest.mark.slow
@SOME
@given(p=problems(FLOAT64), num_blocks=st.integers(1, 5), seed=st.integers(0, 1000))
def test_permuting_the_coordinates_permutes_blocks_update_and_outputs(
    p: LinearProblem, num_blocks: int, seed: int
) -> None:
    """Labels come from W0's spectrum, which does not depend on the order of rows and columns."""
    assume(num_blocks <= min(p.weight.shape))
    generator = torch.Generator().manual_seed(seed)
    rows, cols = (torch.randperm(n, generator=generator, device="cpu").to(DEVICE) for n in p.weight.shape)
    partition = BlockPartition.from_weight(p.weight, num_blocks)
    A, B = randn(2, p.weight.shape[1], generator=generator), randn(p.weight.shape[0], 2, generator=generator)
    ranks = torch.full((num_blocks,), 2, dtype=torch.int32, device=DEVICE)
    first = replace(p, bias=None, A=A, B=B, partition=partition, ranks=ranks)
    weight = p.weight[rows][:, cols]
    permuted = BlockPartition.from_weight(weight, num_blocks)
    assert torch.equal(permuted.row_block, partition.row_block[rows])
    assert torch.equal(permuted.col_block, partition.col_block[cols])
    second = replace(
        first,
        x=p.x[:, cols],
        dy=p.dy[:, rows],
        weight=weight,
        A=A[:, cols],
        B=B[rows],
        partition=permuted,
    )
    # If the two terms of BA cancel, an entry keeps the rounding error of terms of size 1.
    torch.testing.assert_close(delta(second), delta(first)[rows][:, cols], rtol=1e-12, atol=1e-15)
    y, dx, dA, dB, *_ = first.run()
    expected = (y[:, rows], dx[:, cols], dA[:, cols], dB[rows])
    for found, value in zip(second.run()[:4], expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-12)
