"""block_grad: dB_k = H_k A_kᵀ and dA_k = B_kᵀ H_k with H_k = s · (dyg_kᵀ xg_k) ∘ W0_k; G is never stored."""

from dataclasses import replace

import pytest
import torch
from audit.workloads import configured
from kernel_cases import (
    assert_within_budget,
    padded_width,
)
from problems import LinearProblem, make_problem, relative_error
from torch import Tensor

from smoa_kernels.definition.packed import PackedAdapter, padding_masks
from smoa_kernels.kernels.block_grad import block_grad, token_splits
from smoa_kernels.kernels.common import OLD_TRITON
from smoa_kernels.kernels.permute import gather_columns
from smoa_kernels.kernels.spec import Config

pytestmark = pytest.mark.numerical

# Small tiles, so that small problems have several of each kind.
TILE = (
    64 if OLD_TRITON else 32
)  # a quarter of it is multiplied, of which Triton 3.6 takes at least 16 columns
SMALL = Config(block_n=16, block_c=TILE, block_t=16, split=1, num_warps=4, num_stages=2)
# The narrowest tile that ships. Float32 factors over a half weight are multiplied in bfloat16 parts, a quarter of
# the tile at a time, and tensor cores need at least 16 columns.
WIDE = replace(SMALL, block_c=64)


def gather(problem: LinearProblem, multiple: int = TILE) -> tuple[Tensor, Tensor]:
    """dyg and xg."""
    p = problem.partition
    return (
        gather_columns(problem.dy, p.T, padded_width(p.row_sizes, multiple)),
        gather_columns(problem.x, p, padded_width(p.col_sizes, multiple)),
    )


def block_gradients(
    dyg: Tensor, xg: Tensor, adapter: PackedAdapter, config: Config = SMALL
) -> tuple[Tensor, Tensor]:
    with configured("block_grad", config):
        return block_grad(dyg, xg, adapter)


def gradients(problem: LinearProblem, config: Config = SMALL) -> tuple[Tensor, Tensor]:
    return block_gradients(*gather(problem, config.block_c), problem.adapter(), config)


def check(problem: LinearProblem, dtype: torch.dtype, factor_dtype: torch.dtype | None = None) -> None:
    rounded = problem.to(dtype, factor_dtype)
    exact = rounded.to(torch.float64)
    truth = exact.run_reference()[2:4]
    sizes = {name: getattr(exact, name).abs() for name in ("x", "weight", "A", "B", "dy")}
    terms = replace(exact, **sizes).run_reference()[2:4]
    tile = SMALL if factor_dtype is None else WIDE
    for config in (tile, replace(tile, split=2)):
        ours = gradients(rounded, config)
        padding = padding_masks(rounded.partition, rounded.ranks, rounded.A.shape[0])
        for mine, theirs, true, size, used in zip(
            ours, rounded.run_reference()[2:4], truth, terms, padding, strict=True
        ):
            # A short sum may be exact by luck in the reference, so four float32 roundings of the terms are allowed.
            if ((mine.double() - true).abs() > 4 * 2**-23 * size).any():
                assert_within_budget(mine, theirs, true)
            assert not mine[~used].any()


@pytest.mark.parametrize("split", [0, 1])
def test_no_tokens(split: int) -> None:
    problem = make_problem(tokens=0, dtype=torch.float32)
    for gradient in gradients(problem, replace(SMALL, split=split)):
        assert not gradient.any()


def test_large_half_gradients_do_not_overflow() -> None:
    """H is float32: G may exceed float16's range if the factor gradients are small enough."""
    problem = make_problem(tokens=16)
    problem = replace(problem, x=problem.x * 300, dy=problem.dy * 300, weight=problem.weight * 1e-3)
    rounded = problem.to(torch.float16)
    for mine, true in zip(gradients(rounded), rounded.to(torch.float64).run_reference()[2:4], strict=True):
        assert mine.isfinite().all()
        assert relative_error(mine, true) < 2**-10  # float16 and each TF32 operand round by 2^-11


def test_token_splits() -> None:
    assert token_splits(8192, 1000, 132, 64) == 1  # the tiles fill the device
    assert token_splits(8192, 32, 132, 64) == 5  # 160 programs on 132 multiprocessors
    assert token_splits(600, 8, 132, 64) == 1  # too few tokens to share
    assert token_splits(0, 8, 132, 64) == 1
