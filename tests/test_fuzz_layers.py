"""`FusedSMoALinear` against the C oracle, on random weights: blocks, output, merged output."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import c_oracle
import pytest
import torch
from draws import given, share, st
from fuzzed import absolute, allowed, compare, compare_blocks, problems, rules
from problems import DEVICE, DTYPES, LinearProblem, obstacle
from torch import Tensor

pytestmark = pytest.mark.numerical


def definition(p: LinearProblem) -> Tensor:
    """ΔW from the oracle."""
    tensors = (p.weight, p.A, p.B, p.partition.row_block, p.partition.col_block)
    found = c_oracle.delta_weight(*(t.double() for t in tensors), p.ranks, scaling=p.scaling)
    return torch.from_numpy(found).to(DEVICE)


class Case(NamedTuple):
    """A problem, the rule for a layer's own blocks, and whether the layer keeps them or takes the problem's."""

    problem: LinearProblem
    rule: dict[str, Any]
    own: bool


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...]) -> Case:
    p = draw(problems(dtypes, of_a_layer=True))
    return Case(p, draw(rules(p.partition.shape, p.partition.num_blocks)), draw(st.booleans()))


def check(case: Case, backend: str) -> None:
    p = case.problem
    layer = p.layer(backend=backend, **case.rule)
    p = replace(p, weight=p.weight.clone())  # merging changes the layer's weight in place
    compare_blocks(layer.partition, p.weight, **case.rule)
    if case.own:
        p = replace(p, partition=layer.partition)
    else:
        layer.partition = p.partition
    p = replace(p, scaling=layer.scaling)
    with torch.no_grad():
        y = layer(p.x)
        compare([y], p)
        layer.merge()
        compare([layer(p.x)], p)
        error = (layer.delta_weight().double() - definition(p)).abs()
        assert (error <= allowed(definition(absolute(p)), p.weight.dtype)).all()
        layer.unmerge()
        assert torch.equal(layer.weight, p.weight)
        assert torch.equal(layer(p.x), y)


@share(0.13)
@given(case=cases(DTYPES))
def test_eager(case: Case) -> None:
    check(case, "eager")


@share(0.03)
@given(case=cases(DTYPES[1:]))
@pytest.mark.slow
def test_triton(case: Case) -> None:
    if (reason := obstacle("triton")) is not None:
        pytest.skip(reason)
    check(case, "triton")
