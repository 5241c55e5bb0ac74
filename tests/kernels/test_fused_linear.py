"""fused_linear: y = x W0ᵀ + x ΔWᵀ + bias in one pass and one rounding; with `adapter.T`, dX = dY W_eff."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    DTYPES,
    Guarded,
    adapter_of,
    assert_within_budget,
    assert_within_its_rounding,
    delta_weight,
    from_vector,
    linear,
    shipped_here,
)
from problems import LinearProblem, make_problem
from torch import Tensor
from vectors import Vector, all_vectors

from smoa_kernels.kernels import heuristic
from smoa_kernels.kernels.fused_linear import fused_linear
from smoa_kernels.kernels.launch import FusedLinearConfig, fused_linear_configs

pytestmark = pytest.mark.numerical

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def dx(problem: LinearProblem) -> Tensor:
    return problem.dy @ (problem.weight + delta_weight(problem))


def check(problem: LinearProblem, dtype: torch.dtype, factor_dtype: torch.dtype | None = None) -> None:
    rounded = problem.to(dtype, factor_dtype)
    truth, same = rounded.to(torch.float64), rounded.to(dtype)
    adapter = adapter_of(rounded)
    assert_within_budget(fused_linear(rounded.x, rounded.bias, adapter), linear(same), linear(truth))
    assert_within_budget(fused_linear(rounded.dy, None, adapter.T), dx(same), dx(truth))


@each_dtype
@pytest.mark.parametrize("vector", all_vectors(), ids=lambda vector: vector.name)
def test_vectors(vector: Vector, dtype: torch.dtype, device: torch.device) -> None:
    check(from_vector(vector).on(device), dtype)


@pytest.mark.parametrize("rank", [1, 16, 64, 65, 256])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)], ids=str)
def test_ranks(rank: int, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device) -> None:
    """One product or a loop over chunks of the rank; float32 factors over a half weight."""
    problem = make_problem(tokens=3, ranks=(rank, max(rank // 2, 1)), random_labels=True)
    check(problem.on(device), *dtypes)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "dtype"), shipped_here("fused_linear"), ids=str)
def test_every_shipped_configuration(config: FusedLinearConfig, dtype: str, device: torch.device) -> None:
    problem = make_problem(tokens=35, out_features=70, in_features=150, ranks=(5, 2))
    problem = problem.on(device).to(heuristic.DTYPES[dtype])
    settings = {"allow_tf32": dtype == "tf32", "config": config}
    y = fused_linear(problem.x, problem.bias, adapter_of(problem), **settings)
    assert_within_its_rounding(dtype, y, linear(problem), linear(problem.to(torch.float64)))


def test_tf32_stays_within_its_own_rounding(device: torch.device) -> None:
    """Operands of 10 explicit bits: 2⁻¹¹ each. Under the interpreter the product is exact."""
    problem = make_problem().on(device).to(torch.float32)
    y = fused_linear(problem.x, problem.bias, adapter_of(problem), allow_tf32=True)
    torch.testing.assert_close(y, linear(problem), rtol=0, atol=4 * 2**-11 * float(y.abs().max()))


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

    adapter = adapter_of(problem, place)
    truth = problem.to(torch.float64)
    for config in fused_linear_configs("cpu", torch.float32, "ieee")[:2]:
        y = fused_linear(place(problem.x), guarded(problem.bias), adapter, config=config)
        assert_within_budget(y, linear(problem), linear(truth))
        assert_within_budget(
            fused_linear(place(problem.dy), None, adapter.T, config=config), dx(problem), dx(truth)
        )


@each_dtype
@pytest.mark.parametrize("split", [1, 4])
def test_two_runs_are_bitwise_equal(split: int, dtype: torch.dtype, device: torch.device) -> None:
    problem = make_problem(in_features=200, ranks=(20, 3), dtype=dtype).on(device)
    configs = fused_linear_configs("cpu", dtype, "ieee")
    config = next(config for config in configs if config.split == split)
    first, second = (
        fused_linear(problem.x, problem.bias, adapter_of(problem), config=config) for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_tiny_adapter_arrives(dtype: torch.dtype, device: torch.device) -> None:
    """No dead zone: at a relative update of 1e-4 the output moves by the adapter's output, bias or none."""
    problem = make_problem(tokens=64, out_features=128, in_features=256, ranks=(4, 4))
    delta, weight = delta_weight(problem), problem.weight
    shrink = 1e-4 * float(weight.norm() / delta.norm())
    rounded = replace(problem, B=problem.B * shrink).on(device).to(dtype, torch.float32)
    off = replace(rounded, B=torch.zeros_like(rounded.B))
    exact = rounded.to(torch.float64)
    adapter_output = exact.x @ delta_weight(exact).T
    for bias in (None, rounded.bias):
        y = fused_linear(rounded.x, bias, adapter_of(rounded)).double()
        y_base = exact.x @ exact.weight.T + (0 if bias is None else bias.double())
        survived = ((y - y_base) * adapter_output).sum() / adapter_output.square().sum()
        # The measure's own noise at this size: one rounding of y, averaged over 64·128 elements.
        noise = float((fused_linear(off.x, bias, adapter_of(off)).double() - y_base).norm())
        noise /= float(adapter_output.norm()) * adapter_output.numel() ** 0.5
        assert abs(float(survived) - 1) < 0.05 + 4 * noise
        merged = (rounded.weight + delta_weight(rounded.to(dtype))).double()
        lost = ((exact.x @ (merged - exact.weight).T) * adapter_output).sum() / adapter_output.square().sum()
        if dtype == torch.bfloat16:
            assert float(lost) < 0.5


def test_no_tokens(device: torch.device) -> None:
    problem = make_problem(tokens=0, dtype=torch.float32).on(device)
    assert fused_linear(problem.x, problem.bias, adapter_of(problem)).shape == (0, 33)


def test_a_shard_without_columns_gives_the_bias(device: torch.device) -> None:
    problem = make_problem(dtype=torch.float32).on(device)
    adapter = adapter_of(problem)
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
