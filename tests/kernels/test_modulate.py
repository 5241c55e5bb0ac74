"""modulate: W_eff = W0 ∘ (1 + s·mask·BA) dense, and ΔW = s·(BA) ∘ W0 as padded blocks."""

import pytest
import torch
from kernel_cases import (
    assert_within_budget,
    each_dtype,
    padded_width,
)
from problems import LinearProblem, make_problem
from torch import Tensor

from smoa_kernels.definition.partition import BlockPartition
from smoa_kernels.kernels.modulate import modulated_blocks, modulated_weight

pytestmark = pytest.mark.numerical


def effective(problem: LinearProblem) -> Tensor:
    return problem.weight + problem.delta_weight()


def padded(partition: BlockPartition, row_multiple: int = 16, col_multiple: int = 16) -> tuple[int, int]:
    return padded_width(partition.row_sizes, row_multiple), padded_width(partition.col_sizes, col_multiple)


def from_blocks(blocks: Tensor, partition: BlockPartition) -> Tensor:
    """The dense ΔW of padded blocks; checks that their padding is zero."""
    dense = torch.zeros(partition.shape, dtype=blocks.dtype, device=blocks.device)
    rows = partition.row_index.split(partition.row_sizes)
    cols = partition.col_index.split(partition.col_sizes)
    for k, block in enumerate(blocks):
        dense[rows[k][:, None], cols[k]] = block[: len(rows[k]), : len(cols[k])]
        assert not block[len(rows[k]) :].any()
        assert not block[:, len(cols[k]) :].any()
    return dense


def check(problem: LinearProblem, dtype: torch.dtype, factor_dtype: torch.dtype | None = None) -> None:
    rounded = problem.to(dtype, factor_dtype)
    truth, same = rounded.to(torch.float64), rounded.to(dtype)
    adapter = rounded.adapter()
    weight = modulated_weight(adapter)
    assert weight.stride() == rounded.weight.stride()
    assert_within_budget(weight, effective(same), effective(truth))
    blocks = modulated_blocks(adapter, padded(rounded.partition, 16, 32))
    assert_within_budget(from_blocks(blocks, rounded.partition), same.delta_weight(), truth.delta_weight())


@each_dtype
def test_merges_in_place(dtype: torch.dtype) -> None:
    adapter = make_problem(dtype=dtype).adapter()
    expected = modulated_weight(adapter)
    modulated_weight(adapter, out=adapter.weight)
    assert torch.equal(adapter.weight, expected)


def test_a_block_of_rank_zero_and_other_blocks_leave_the_weight_alone() -> None:
    problem = make_problem(ranks=(0, 4), dtype=torch.bfloat16)
    weight, p = modulated_weight(problem.adapter()), problem.partition
    adapted = (p.row_block[:, None] == p.col_block) & (p.row_block[:, None] == 1)
    assert torch.equal(weight[~adapted], problem.weight[~adapted])
    assert not torch.equal(weight[adapted], problem.weight[adapted])
