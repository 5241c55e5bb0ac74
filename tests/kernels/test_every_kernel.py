"""Every kernel on the definition's vectors, at every rank, and on small random problems.

The random problems have uneven and empty blocks, uneven and zero ranks, or one token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from audit.forms import AUDITED
from audit.workloads import WORKLOADS, Operands, configured, delta_weight
from draws import HealthCheck, assume, given, settings, st
from kernel_cases import CHECKED, assert_within_its_rounding, check, each_dtype, results, shipped_here
from problems import DEVICE, HALF, LinearProblem, make_problem, relative_error
from test_permute import gather, gathered_by_hand, random_partition
from torch import Tensor
from vectors import Vector, all_vectors

from smoa_kernels.definition.block_rule import BlockRule
from smoa_kernels.definition.packed import PackedAdapter
from smoa_kernels.definition.precision import PRECISIONS, Precision, multiplied_in
from smoa_kernels.definition.thresholds import round_weight
from smoa_kernels.kernels.architectures import ARCHITECTURES
from smoa_kernels.kernels.fused_linear import fused_linear
from smoa_kernels.kernels.modulate import modulated_weight
from smoa_kernels.kernels.permute import scatter_columns
from smoa_kernels.kernels.registry import KERNELS
from smoa_kernels.kernels.spec import GRANULE, Config, Key

pytestmark = pytest.mark.numerical


# All block orders take the same path in the kernels, so the other orders run only in `make test-all`.
VECTORS = [
    pytest.param(v, id=v.name, marks=[pytest.mark.slow] if v.rule != BlockRule(v.rule.num_blocks) else [])
    for v in all_vectors()
]

few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


each_kernel = pytest.mark.parametrize("kernel", CHECKED)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        *(pytest.param(half, marks=pytest.mark.slow) for half in (torch.bfloat16, torch.float16)),
    ],
)
@pytest.mark.parametrize("vector", VECTORS)
@each_kernel
def test_vectors(kernel: str, vector: Vector, dtype: torch.dtype) -> None:
    check(kernel, vector.problem.on(DEVICE), dtype)


@pytest.mark.parametrize("rank", [1, 16, *(pytest.param(rank, marks=pytest.mark.slow) for rank in (65, 256))])
@each_kernel
def test_float32_factors_over_a_half_weight(kernel: str, rank: int) -> None:
    """At ranks that need one product, several products, and the largest rank."""
    problem = make_problem(tokens=5, ranks=(rank, max(rank // 2, 1)), random_labels=True)
    check(kernel, problem, torch.bfloat16, torch.float32)


def shipped() -> Iterator[object]:
    for name in KERNELS:
        for config, precision in shipped_here(name):
            marks = [pytest.mark.slow, *([pytest.mark.long] if name.startswith("grouped") else [])]
            yield pytest.param(name, config, precision, id=f"{name}-{config}-{precision.name}", marks=marks)


@pytest.mark.parametrize(("kernel", "config", "precision"), list(shipped()))
def test_every_shipped_configuration(kernel: str, config: Config, precision: Precision) -> None:
    """At sizes that are not a multiple of any tile."""
    form = AUDITED[kernel].forms[0]
    tokens, *features, granule = (21, 136, 72, GRANULE) if "granules" in form else (70, 130, 70, 1)
    key = Key(kernel, precision.name, 5, 2, *features, tokens, 128, 128, granule=granule)
    run, defined = WORKLOADS[kernel](Operands(key, form, DEVICE))
    with configured(kernel, config, precision.name):
        found = run()
    for ours, reference, truth in zip(found, defined(precision.dtype), defined(torch.float64), strict=True):
        assert_within_its_rounding(precision, ours, reference, truth)


@pytest.mark.parametrize(
    ("kernel", "version", "largest"),
    [
        ("grouped_linear", "3.6.0", 128),
        ("grouped_linear", "3.9.0", 256),
        ("grouped_grad", "3.6.0", 64),
        ("grouped_grad", "3.10.0", 128),
    ],
)
def test_large_tiles_ship_only_where_they_do_not_spill(kernel: str, version: str, largest: int) -> None:
    first = vars(KERNELS[kernel].shipped(ARCHITECTURES["sm_90"], PRECISIONS["bf16"], version)[0])
    assert first["block_n" if kernel == "grouped_grad" else "block_t"] == largest


@st.composite
def problems(draw: st.DrawFn) -> LinearProblem:
    ranks = draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 16, 17, 40]), min_size=1, max_size=4))
    most = {"tokens": 20, "out_features": 70, "in_features": 70}
    sizes = {name: draw(st.integers(1, largest)) for name, largest in most.items()}
    bias, seed = draw(st.booleans()), draw(st.integers(0, 1000))
    return make_problem(**sizes, ranks=tuple(ranks), bias=bias, random_labels=True, seed=seed)


@pytest.mark.slow
@few
@given(problem=problems())
@each_dtype
@each_kernel
def test_random_shapes(kernel: str, problem: LinearProblem, dtype: torch.dtype) -> None:
    if kernel == "fused_linear":  # the backend gives it no sum over one row or column
        assume(min(problem.weight.shape) > 1)
    check(kernel, problem, dtype)


@pytest.mark.slow
@few
@given(
    tokens=st.integers(1, 70),
    columns=st.integers(1, 300),
    num_blocks=st.integers(1, 5),
    data=st.integers(0, 99),
)
@each_dtype
def test_gather_and_scatter(
    tokens: int, columns: int, num_blocks: int, data: int, dtype: torch.dtype
) -> None:
    partition = random_partition(columns, num_blocks, data)
    x = torch.randn(tokens, columns).to(dtype)
    blocked = gather(x, partition)
    assert torch.equal(blocked, gathered_by_hand(x, partition))
    assert torch.equal(scatter_columns(blocked, partition, torch.empty_like(x)), x)


# What one kernel promises


@each_dtype
def test_w_eff_has_the_weights_memory_order(dtype: torch.dtype) -> None:
    problem = make_problem(dtype=dtype)
    for weight in (problem.weight, problem.weight.T.contiguous().T):
        assert modulated_weight(replace(problem.adapter(), weight=weight)).stride() == weight.stride()


PRECISE = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float16, torch.float32: torch.float16}


@each_dtype
def test_w_eff_is_rounded_by_thresholds(dtype: torch.dtype) -> None:
    """As the definition rounds, in float16 also where it is merged under TF32; float32 itself is not rounded."""
    p = make_problem(dtype=dtype, out_features=70, in_features=150, random_labels=True)
    p = replace(p, B=p.B * 1e-3)
    adapter, exact = p.adapter(), modulated_weight(p.to(torch.float32).adapter(), ieee=True)
    with multiplied_in("tf32"):
        found, merged = modulated_weight(p.adapter()), modulated_weight(p.adapter(), ieee=True)
    expected = round_weight(exact, PRECISE[dtype])
    assert relative_error(found, exact) > 1e-5
    same = found == expected.to(dtype) if dtype == torch.float32 else found == expected
    assert same.double().mean() > 0.99  # a factor in TF32 or an FMA may move W_eff across a threshold
    assert relative_error(found, expected.double()) < 2**-11
    assert torch.equal(merged, exact.to(dtype) if dtype == torch.float32 else found)
    if dtype != torch.float32:
        zero = replace(adapter, B=torch.zeros_like(adapter.B))
        assert torch.equal(modulated_weight(zero), p.weight)


@pytest.mark.parametrize("dtype", HALF)
def test_shards_and_the_transposed_weight_round_alike(dtype: torch.dtype) -> None:
    p = make_problem(dtype=dtype, out_features=70, in_features=150, random_labels=True)
    adapter = p.adapter()
    whole, rows, cols = modulated_weight(adapter), slice(33, 70), slice(17, 140)
    part = replace(
        adapter,
        weight=adapter.weight[rows, cols],
        A=adapter.A[:, cols],
        B=adapter.B[rows],
        partition=adapter.partition.shard(rows, cols),
        place=adapter.place.part(rows.start, cols.start),
    )
    assert torch.equal(modulated_weight(part), whole[rows, cols])
    assert torch.equal(modulated_weight(adapter.T), whole.T)


@pytest.mark.parametrize("dtype", HALF)
def test_what_is_not_finite_and_what_is_small_rounds_as_defined(dtype: torch.dtype) -> None:
    """Of NaN the largest: NVIDIA's is 0x7fffffff in float32, to which nothing may be added."""
    p, kind = make_problem(dtype=dtype, ranks=(0, 2)), torch.finfo(dtype)
    # Triton's interpreter has no subnormal bfloat16.
    tiny = kind.smallest_normal / (4 if dtype == torch.float16 else 1)
    odd = torch.tensor([0.0, float("inf"), -float("inf"), kind.max, -kind.max, tiny, -kind.smallest_normal])
    weight = odd.to(dtype).repeat(p.weight.numel() // 7 + 1)[: p.weight.numel()].view_as(p.weight).clone()
    weight.view(torch.int16)[::3, ::5] = 0x7FFF
    adapter = replace(p, weight=weight, B=p.B * 0.01).adapter()
    modulation, W0 = defined_modulation(adapter), adapter.weight.float()
    W_eff = torch.where(modulation == 0, W0, W0 + W0 * modulation)
    close = {"equal_nan": True, "rtol": 2 * torch.finfo(dtype).eps, "atol": 0}
    torch.testing.assert_close(modulated_weight(adapter), round_weight(W_eff, dtype), **close)


def defined_modulation(adapter: PackedAdapter) -> Tensor:
    """s·mask·(B A) in float32."""
    ones = torch.ones_like(adapter.weight, dtype=torch.float32)
    return delta_weight(replace(adapter, weight=ones), torch.float32)


def test_a_shard_without_columns_gives_the_bias() -> None:
    p, none = make_problem(dtype=torch.float32), slice(0)
    whole = p.adapter()
    blocks = whole.partition.shard(col_slice=none)
    shard = replace(whole, weight=whole.weight[:, none], A=whole.A[:, none], partition=blocks)
    y = fused_linear(p.x[:, none], p.bias, shard)
    assert p.bias is not None
    assert torch.equal(y, p.bias.expand_as(y))


def test_a_block_of_rank_zero_and_other_blocks_leave_the_weight_alone() -> None:
    problem = make_problem(ranks=(0, 4), dtype=torch.bfloat16)
    weight, p = modulated_weight(problem.adapter()), problem.partition
    adapted = (p.row_block[:, None] == p.col_block) & (p.row_block[:, None] == 1)
    assert torch.equal(weight[~adapted], problem.weight[~adapted])
    assert not torch.equal(weight[adapted], problem.weight[adapted])


def test_large_half_gradients_do_not_overflow() -> None:
    """H is float32: G may exceed float16's range if the factor gradients are small enough."""
    problem = make_problem(tokens=16)
    problem = replace(problem, x=problem.x * 300, dy=problem.dy * 300, weight=problem.weight * 1e-3)
    rounded = problem.to(torch.float16)
    truth = rounded.to(torch.float64).run_reference()[2:4]
    for mine, true in zip(results("contract", rounded), truth, strict=True):
        assert mine.isfinite().all()
        assert relative_error(mine, true) < 2**-10  # float16 and each TF32 operand round by 2^-11
