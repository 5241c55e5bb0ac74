"""`smoa_linear` against the C oracle: random shapes, strides, dtypes, ranks, blocks, algorithms.

make nightly     # 10,000 problems instead of 300 (tests/draws.py)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from draws import example, given, share, st
from fuzzed import compare, problems
from problems import DEVICE, DTYPES, LinearProblem, kept, make_problem, obstacle

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
        mask = kept(backend, p, drawn) * drawn.scale
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


@share(0.5)
@given(case=cases(eager.ALGORITHMS, DTYPES))
@example(case=Case(make_problem(ranks=(0,)), "split"))
def test_eager(case: Case) -> None:
    check(case, "eager")


def needs(backend: str) -> None:
    if (reason := obstacle(backend)) is not None:
        pytest.skip(reason)


@share(0.37)
@given(case=cases(eager.ALGORITHMS, (torch.float32,)))
def test_native(case: Case) -> None:
    """Without autocast, which would change the dtype to one that compiled code does not take."""
    needs("native")
    check(case._replace(autocast=None), "native")


@share(0.13)
@given(case=cases(("merged", "split", "fused"), DTYPES[1:]))
@pytest.mark.slow
def test_triton(case: Case) -> None:
    """In the interpreter one example takes as long as fifty on torch."""
    needs("triton")
    assert algorithms_of("triton") == ("merged", "split", "fused")
    check(case, "triton")
