"""block_matmul: y[:, rows_k] = xg_k ΔW_kᵀ of all blocks in one launch, and the transposed product."""

import pytest
import torch
from audit.workloads import configured
from kernel_cases import (
    assert_within_budget,
    each_dtype,
)
from problems import LinearProblem, make_problem
from test_modulate import padded
from torch import Tensor

from smoa_kernels.definition.packed import PackedAdapter
from smoa_kernels.kernels.block_matmul import block_matmul
from smoa_kernels.kernels.modulate import modulated_blocks
from smoa_kernels.kernels.permute import gather_columns, scatter_columns
from smoa_kernels.kernels.spec import Config

pytestmark = pytest.mark.numerical

# Small tiles, so that small problems have several of each kind and a partial last group of tokens.
TILE = 16
SMALL = Config(block_t=16, block_n=TILE, block_c=TILE, group_t=2, num_warps=4, num_stages=2)


def small_matmul(x: Tensor, adapter: PackedAdapter, delta: Tensor, *, out: Tensor) -> Tensor:
    with configured("block_matmul", SMALL):
        return block_matmul(x, adapter, delta, out=out)


def output(problem: LinearProblem) -> Tensor:
    """x ΔWᵀ, with the blocks of ΔW and of x from their own kernels."""
    adapter = problem.adapter()
    delta = modulated_blocks(adapter, padded(adapter.partition))
    out = torch.empty_like(problem.dy)
    return small_matmul(gather_columns(problem.x, adapter.partition, delta.shape[2]), adapter, delta, out=out)


def check(problem: LinearProblem, dtype: torch.dtype, factor_dtype: torch.dtype | None = None) -> None:
    rounded = problem.to(dtype, factor_dtype)
    delta, true_delta = rounded.delta_weight(), rounded.to(torch.float64).delta_weight()
    same, truth = rounded.x @ delta.T, rounded.x.double() @ true_delta.T
    assert_within_budget(output(rounded), same, truth)


@each_dtype
@pytest.mark.parametrize("contiguous", [True, False])
def test_transposed_is_dy_delta(contiguous: bool, dtype: torch.dtype) -> None:
    """dX of the adapter (dY ΔW, in block order), from its own blocks of ΔW or from the transposed adapter's."""
    problem = make_problem(tokens=19, random_labels=True).to(dtype)
    adapter = problem.adapter()
    read = adapter.T if contiguous else adapter
    delta = modulated_blocks(read, padded(read.partition))
    delta = delta if contiguous else delta.transpose(1, 2)
    dyg = gather_columns(problem.dy, adapter.T.partition, delta.shape[2])
    dxg = torch.empty(19, 3, delta.shape[1], dtype=dtype)
    small_matmul(dyg, adapter.T, delta, out=dxg)
    partition = adapter.partition
    for k, size in enumerate(partition.col_sizes):
        assert not dxg[:, k, size:].any()  # padding is zero, so it is finite
    dx = torch.empty_like(problem.x)
    scatter_columns(dxg, partition, dx)
    truth = problem.dy.double() @ problem.to(torch.float64).delta_weight()
    assert_within_budget(dx, problem.dy @ problem.delta_weight(), truth)
    natural = torch.empty_like(dx)
    assert torch.equal(small_matmul(dyg, adapter.T, delta, out=natural), dx)
