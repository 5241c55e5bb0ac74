"""fused_linear: y = x W0ᵀ + x ΔWᵀ + bias in one pass, rounded once; with `adapter.T`, dX = dY W_eff."""

from dataclasses import replace

import pytest
import torch
from audit.workloads import configured
from kernel_cases import (
    Guarded,
    assert_within_budget,
    shipped_here,
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


@pytest.mark.parametrize("row_padding", [0, 5])
@pytest.mark.parametrize("transposed", [False, True])
def test_strides_and_guards(
    transposed: bool, row_padding: int, guarded: Guarded, device: torch.device
) -> None:
    problem = make_problem(tokens=9, out_features=70, in_features=45, ranks=(3, 0, 20))
    problem = problem.on(device).to(torch.float32)
    if transposed:
        problem = replace(problem, weight=problem.weight.T.contiguous().T, x=problem.x.T.contiguous().T)
    assert problem.bias is not None

    def place(tensor: Tensor) -> Tensor:
        return guarded(tensor, row_padding=row_padding)

    adapter = problem.adapter(place)
    truth = problem.to(torch.float64)
    for config, _ in shipped_here("fused_linear")[:2]:
        with configured("fused_linear", config):
            y = fused_linear(place(problem.x), guarded(problem.bias), adapter)
            found = fused_linear(place(problem.dy), None, adapter.T)
        assert_within_budget(y, problem.forward(reference_linear), truth.forward(reference_linear))
        assert_within_budget(found, dx(problem), dx(truth))


def test_no_tokens(device: torch.device) -> None:
    problem = make_problem(tokens=0, dtype=torch.float32).on(device)
    assert fused_linear(problem.x, problem.bias, problem.adapter()).shape == (0, 33)


def test_a_shard_without_columns_gives_the_bias(device: torch.device) -> None:
    problem = make_problem(dtype=torch.float32).on(device)
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
