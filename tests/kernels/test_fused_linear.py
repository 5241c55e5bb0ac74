"""fused_linear: y = x W0ᵀ + x ΔWᵀ + bias in one pass, rounded once; with `adapter.T`, dX = dY W_eff."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    assert_within_budget,
)
from problems import LinearProblem, make_problem, reference_linear
from torch import Tensor

from smoa_kernels.kernels.fused_linear import fused_linear

pytestmark = pytest.mark.numerical


def dx(problem: LinearProblem) -> Tensor:
    return problem.dy @ (problem.weight + problem.delta_weight())


def check(problem: LinearProblem, dtype: torch.dtype, factor_dtype: torch.dtype | None = None) -> None:
    rounded = problem.to(dtype, factor_dtype)
    truth, same = rounded.to(torch.float64), rounded.to(dtype)
    adapter = rounded.adapter()
    assert_within_budget(
        fused_linear(rounded.x, rounded.bias, adapter),
        same.forward(reference_linear),
        truth.forward(reference_linear),
    )
    assert_within_budget(fused_linear(rounded.dy, None, adapter.T), dx(same), dx(truth))


def test_a_shard_without_columns_gives_the_bias() -> None:
    problem = make_problem(dtype=torch.float32)
    adapter = problem.adapter()
    none = slice(0)
    shard = replace(
        adapter,
        weight=adapter.weight[:, none],
        A=adapter.A[:, none],
        partition=adapter.partition.shard(col_slice=none),
    )
    y = fused_linear(problem.x[:, none], problem.bias, shard)
    assert problem.bias is not None
    assert torch.equal(y, problem.bias.expand_as(y))
