"""Every kernel on the definition's vectors, at every rank, and on small random problems.

The random problems have uneven and empty blocks, uneven and zero ranks, or one token.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import pytest
import test_block_grad
import test_block_matmul
import test_fused_linear
import test_modulate
import torch
from audit.forms import AUDITED
from audit.workloads import WORKLOADS, Operands, configured
from draws import HealthCheck, assume, given, settings, st
from kernel_cases import assert_within_its_rounding, each_dtype, shipped_here
from problems import DEVICE, LinearProblem, make_problem
from test_permute import gather, gathered_by_hand, random_partition
from vectors import Vector, all_vectors

from smoa_kernels.definition.block_rule import BlockRule
from smoa_kernels.definition.precision import PRECISIONS, Precision
from smoa_kernels.kernels import KERNELS
from smoa_kernels.kernels.architectures import ARCHITECTURES
from smoa_kernels.kernels.permute import scatter_columns
from smoa_kernels.kernels.spec import GRANULE, Config, Key

pytestmark = pytest.mark.numerical

CHECKS = [test.check for test in (test_block_grad, test_block_matmul, test_fused_linear, test_modulate)]

# All block orders take the same path in the kernels, so the other orders run only in `make test-all`.
VECTORS = [
    pytest.param(v, id=v.name, marks=[pytest.mark.slow] if v.rule != BlockRule(v.rule.num_blocks) else [])
    for v in all_vectors()
]

few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


each_check = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__module__)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        *(pytest.param(half, marks=pytest.mark.slow) for half in (torch.bfloat16, torch.float16)),
    ],
)
@pytest.mark.parametrize("vector", VECTORS)
@each_check
def test_vectors(check: Callable[..., None], vector: Vector, dtype: torch.dtype) -> None:
    check(vector.problem.on(DEVICE), dtype)


@pytest.mark.parametrize("rank", [1, 16, *(pytest.param(rank, marks=pytest.mark.slow) for rank in (65, 256))])
@each_check
def test_float32_factors_over_a_half_weight(check: Callable[..., None], rank: int) -> None:
    """At ranks that need one product, several products, and the largest rank."""
    problem = make_problem(tokens=5, ranks=(rank, max(rank // 2, 1)), random_labels=True)
    check(problem, torch.bfloat16, torch.float32)


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
    for ours, theirs, truth in zip(found, defined(precision.dtype), defined(torch.float64), strict=True):
        assert_within_its_rounding(precision, ours, theirs, truth)


@pytest.mark.parametrize(
    ("kernel", "old", "arch", "dtype", "largest"),
    [
        ("block_matmul", True, "sm_90", "bf16", 128),
        ("block_matmul", True, "sm_90", "tf32", 64),
        ("block_matmul", True, "sm_100", "bf16", 64),
        ("block_matmul", False, "sm_90", "tf32", 256),
        ("block_matmul", False, "sm_80", "bf16", 128),
        ("block_matmul", False, "sm_100", "bf16", 256),
        ("grouped_linear", True, "sm_90", "bf16", 128),
        ("grouped_linear", False, "sm_90", "bf16", 256),
        ("grouped_grad", True, "sm_90", "bf16", 64),
        ("grouped_grad", False, "sm_90", "bf16", 128),
    ],
)
def test_large_tiles_ship_only_where_they_do_not_spill(
    kernel: str, old: bool, arch: str, dtype: str, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module(f"smoa_kernels.kernels.{kernel}"), "OLD_TRITON", old)
    first = vars(KERNELS[kernel].shipped(ARCHITECTURES[arch], PRECISIONS[dtype])[0])
    assert first["block_n" if kernel == "grouped_grad" else "block_t"] == largest


@st.composite
def problems(draw: st.DrawFn) -> LinearProblem:
    ranks = draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 16, 17, 40]), min_size=1, max_size=4))
    return make_problem(
        tokens=draw(st.integers(1, 20)),
        out_features=draw(st.integers(1, 70)),
        in_features=draw(st.integers(1, 70)),
        ranks=tuple(ranks),
        bias=draw(st.booleans()),
        random_labels=True,
        seed=draw(st.integers(0, 1000)),
    )


@pytest.mark.slow
@few
@given(problem=problems())
@each_dtype
@each_check
def test_random_shapes(check: Callable[..., None], problem: LinearProblem, dtype: torch.dtype) -> None:
    if check is test_fused_linear.check:  # the backend gives it no sum over one row or column
        assume(min(problem.weight.shape) > 1)
    check(problem, dtype)


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
