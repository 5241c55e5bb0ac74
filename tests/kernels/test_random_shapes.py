"""Every kernel on small problems that nobody picked: uneven and empty blocks, uneven and zero ranks, one token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import test_block_grad
import test_block_matmul
import test_fused_linear
import test_modulate
import torch
from draws import HealthCheck, given, settings, st
from kernel_cases import each_dtype
from problems import LinearProblem, make_problem
from test_permute import gather, gathered_by_hand, random_partition, scatter

pytestmark = [pytest.mark.numerical, pytest.mark.slow]

CHECKS = [test.check for test in (test_block_grad, test_block_matmul, test_fused_linear, test_modulate)]

few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


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


@few
@given(problem=problems())
@each_dtype
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__module__)
def test_random_shapes(
    check: Callable[..., None], problem: LinearProblem, dtype: torch.dtype, device: torch.device
) -> None:
    check(problem.on(device), dtype)


@few
@given(
    tokens=st.integers(1, 70),
    columns=st.integers(1, 300),
    num_blocks=st.integers(1, 5),
    data=st.integers(0, 99),
)
@each_dtype
def test_gather_and_scatter(
    tokens: int, columns: int, num_blocks: int, data: int, dtype: torch.dtype, device: torch.device
) -> None:
    partition = random_partition(columns, num_blocks, device, data)
    x = torch.randn(tokens, columns, device=device).to(dtype)
    blocked = gather(x, partition)
    assert torch.equal(blocked, gathered_by_hand(x, partition))
    assert torch.equal(scatter(blocked, partition, torch.empty_like(x)), x)
