"""`smoa_linear` and `FusedSMoALinear` against the C oracle: random shapes, strides, dtypes, ranks, blocks, algorithms.

make nightly     # 10,000 problems instead of 300 (tests/draws.py)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import c_oracle
import pytest
import torch
from draws import example, given, share, st
from fuzzed import absolute, allowed, compare, compare_blocks, problems, rules
from problems import DEVICE, DTYPES, LinearProblem, make_problem, unsupported_reason
from torch import Tensor

from smoa_kernels.backends import algorithms_of, eager
from smoa_kernels.definition.dropout import Dropout

pytestmark = pytest.mark.numerical

SEED = torch.tensor(11, device=DEVICE)


class Case(NamedTuple):
    """A problem and the settings to run it with."""

    problem: LinearProblem
    algorithm: str
    dropout_p: float = 0.0
    autocast: torch.dtype | None = None


@st.composite
def cases(draw: st.DrawFn, algorithms: tuple[str, ...], dtypes: tuple[torch.dtype, ...]) -> Case:
    problem = draw(problems(dtypes))
    autocast = draw(st.sampled_from([None, None, None, torch.bfloat16, torch.float16]))
    if autocast is not None:  # autocast takes W0 and the bias in any dtype
        wide = problem.to(draw(st.sampled_from(dtypes)))
        problem = replace(problem, weight=wide.weight, bias=wide.bias)
    dropout_p = draw(st.sampled_from([0.0, 0.0, 0.3, 0.99]))
    algorithm = draw(st.sampled_from(("auto", *(("split",) if dropout_p else algorithms))))
    return Case(problem, algorithm, dropout_p, autocast)


def seen(case: Case) -> LinearProblem:
    """The problem after autocast has rounded x, W0 and the bias; autocast ignores float64."""
    p = case.problem
    dtype = p.x.dtype if case.autocast is None or p.x.dtype == torch.float64 else case.autocast
    return p.to(dtype, p.A.dtype)


def check(case: Case, backend: str) -> None:
    p, dropout, mask = seen(case), {}, None
    if case.dropout_p:
        dropout = {"dropout_p": case.dropout_p, "dropout_seed": SEED}
        drawn = Dropout(SEED, case.dropout_p)
        mask = drawn.multiplier(p.x.double())
    stored = replace(case.problem, dy=p.dy)
    found = stored.run(algorithm=case.algorithm, backend=backend, autocast=case.autocast, **dropout)
    alike = [p.x, *(t for t in (stored.x, stored.A, stored.B, stored.bias) if t is not None)]
    assert [result.dtype for result in found] == [tensor.dtype for tensor in alike]
    compare(found, p, mask)


@pytest.fixture(autouse=True, scope="module")
def _small_panels() -> Iterator[None]:
    """Problems are so small that each would fit one panel of tokens or rows; make panels smaller."""
    panels = {"TOKEN_PANEL": 4, "HALF_TOKEN_PANEL": 4, "MERGED_PANEL": 4, "MERGED_HALF_PANEL": 4}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (panels | {"MERGED_BYTES": 0, "MERGED_ALIGNMENT": 3}).items():
            patch.setattr(eager, name, value)
        yield


@share(0.39)
@given(case=cases(eager.ALGORITHMS, DTYPES))
@example(case=Case(make_problem(ranks=(0,)), "split"))
def test_eager(case: Case) -> None:
    check(case, "eager")


def needs(backend: str) -> None:
    if (reason := unsupported_reason(backend)) is not None:
        pytest.skip(reason)


@share(0.2)
@given(case=cases(eager.ALGORITHMS, (torch.float32,)))
def test_native(case: Case) -> None:
    """Without autocast, which would change the dtype to one that compiled code does not take."""
    needs("native")
    check(case._replace(autocast=None), "native")


@share(0.1)
@given(case=cases(("merged", "split", "fused"), DTYPES[1:]))
@pytest.mark.slow
def test_triton(case: Case) -> None:
    """In the interpreter one example takes as long as fifty on torch."""
    needs("triton")
    assert algorithms_of("triton") == ("merged", "split", "fused")
    check(case, "triton")


# Layers on random weights: blocks, output, merged output


def definition(p: LinearProblem) -> Tensor:
    """ΔW from the oracle."""
    return torch.from_numpy(c_oracle.delta_weight(p)).to(DEVICE)


class Layer(NamedTuple):
    """A problem, the rule for a layer's own blocks, and whether the layer keeps them or takes the problem's."""

    problem: LinearProblem
    rule: dict[str, Any]
    own: bool


@st.composite
def layers(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...]) -> Layer:
    p = draw(problems(dtypes, of_a_layer=True))
    return Layer(p, draw(rules(p.partition.shape, p.partition.num_blocks)), draw(st.booleans()))


def check_layer(case: Layer, backend: str) -> None:
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
        outside = p.partition.row_block[:, None] != p.partition.col_block
        assert torch.equal(layer.weight[outside], p.weight[outside])
        compare([layer(p.x)], p)
        error = (layer.delta_weight().double() - definition(p)).abs()
        assert (error <= allowed(definition(absolute(p)), p.weight.dtype)).all()
        layer.unmerge()
        assert torch.equal(layer.weight, p.weight)
        assert torch.equal(layer(p.x), y)


@share(0.13)
@given(case=layers(DTYPES))
def test_eager_layers(case: Layer) -> None:
    check_layer(case, "eager")


@share(0.03)
@given(case=layers(DTYPES[1:]))
@pytest.mark.slow
def test_triton_layers(case: Layer) -> None:
    needs("triton")
    check_layer(case, "triton")
