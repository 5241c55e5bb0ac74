"""`smoa_linear` against the C oracle, on shapes, strides, dtypes, ranks, blocks and algorithms that nobody picked.

A result may differ from the oracle's by a few roundings of its own dtype, measured against what the oracle gives for
the absolute values of all inputs: sums that cancel are judged by the size of their terms.

    make nightly     # 10,000 problems instead of 300 (tests/draws.py)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import c_oracle
import pytest
import torch
from draws import example, given, settings, st
from problems import DEVICE, LinearProblem, make_problem
from torch import Tensor

from smoa_kernels import eager, smoa_linear
from smoa_kernels.backends import load_backend, triton_obstacle
from smoa_kernels.dropout import Dropout

pytestmark = pytest.mark.numerical

ROUNDINGS = 8
SEED = torch.tensor(11, device=DEVICE)

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "column-major": lambda t: t.T.contiguous().T,
    "padded rows": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "strided columns": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "offset": lambda t: torch.cat([t[:1], t])[-t.shape[0] or t.shape[0] + 1 :],
}


class Case(NamedTuple):
    """A problem in its dtypes and strides, and how it is run."""

    problem: LinearProblem
    algorithm: str
    dropout_p: float


@st.composite
def cases(
    draw: st.DrawFn, algorithms: tuple[str, ...], dtypes: tuple[torch.dtype, ...], dropout: bool
) -> Case:
    dropout_p = draw(st.sampled_from([0.0, 0.0, 0.3, 0.99])) if dropout else 0.0
    exact = make_problem(
        tokens=draw(st.integers(0, 20)),
        out_features=draw(st.integers(1, 40)),
        in_features=draw(st.integers(1, 40)),
        ranks=tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 17]), min_size=1, max_size=5))),
        bias=draw(st.booleans()),
        random_labels=True,
        seed=draw(st.integers(0, 10_000)),
    )
    dtype = draw(st.sampled_from(dtypes))
    rounded = exact.to(dtype, draw(st.sampled_from([dtype, torch.promote_types(dtype, torch.float32)])))
    if dtype == torch.float64:
        rounded = exact
    layout = st.sampled_from(sorted(LAYOUTS))
    strided = {
        name: LAYOUTS[draw(layout)](getattr(rounded, name)) for name in ("x", "weight", "A", "B", "dy")
    }
    for name, value in strided.items():
        assert torch.equal(value, getattr(rounded, name))
    algorithm = draw(st.sampled_from(("auto", *(("split",) if dropout_p else algorithms))))
    return Case(replace(rounded, **strided), algorithm, dropout_p)


def check(case: Case, backend: str) -> None:
    p = case.problem
    dropout = {"dropout_p": case.dropout_p, "dropout_seed": SEED} if case.dropout_p else {}
    mask = Dropout(SEED, case.dropout_p).multiplier(p.x.double()) if case.dropout_p else None
    found = p.run(algorithm=case.algorithm, backend=backend, **dropout)
    truth, size = oracle(p, mask), oracle(absolute(p), mask)
    for name, ours, exact, terms in zip(("y", "dX", "dA", "dB"), found, truth, size, strict=False):
        # The narrower of the two dtypes that the result passed through.
        info = max((torch.finfo(ours.dtype), torch.finfo(p.x.dtype)), key=lambda info: info.eps)
        allowed = ROUNDINGS * info.eps * (terms + info.smallest_normal)
        assert ((ours.double() - exact).abs() <= allowed).all(), name


def oracle(p: LinearProblem, mask: Tensor | None) -> tuple[Tensor, ...]:
    """y, dX, dA, dB in float64 by the C code."""
    wide = [t.detach().double() for t in (p.weight, p.A, p.B)]
    blocks = (p.partition.row_block, p.partition.col_block, p.ranks)
    bias = None if p.bias is None else p.bias.double()
    options = {"scaling": p.scaling, "multiplier": mask}
    y = c_oracle.forward(p.x.double(), wide[0], bias, *wide[1:], *blocks, **options)
    gradients = c_oracle.backward(p.dy.double(), p.x.double(), *wide, *blocks, **options)
    return tuple(torch.from_numpy(value).to(DEVICE) for value in (y, *gradients))


def absolute(p: LinearProblem) -> LinearProblem:
    names = ("x", "weight", "bias", "A", "B", "dy")
    return replace(p, **{n: getattr(p, n).abs() for n in names if getattr(p, n) is not None})


def share(part: float) -> settings:
    """So much of all problems that the profile draws; one in the interpreter takes as long as fifty on torch."""
    return settings(max_examples=round(part * settings().max_examples))


@pytest.fixture(autouse=True, scope="module")
def _panels_of_four_tokens() -> Iterator[None]:
    """Problems this small would all be one panel of the eager backend."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TOKEN_PANEL", "HALF_TOKEN_PANEL"):
            patch.setattr(eager, name, 4)
        yield


ALL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@share(0.7)
@given(case=cases(eager.ALGORITHMS, ALL, dropout=True))
@example(case=Case(make_problem(ranks=(0,)), "split", 0.0))
def test_eager(case: Case) -> None:
    check(case, "eager")


@share(0.1)
@given(case=cases(("merged", "split", "fused"), ALL[1:], dropout=False))
def test_triton(case: Case) -> None:
    if (obstacle := triton_obstacle(DEVICE)) is not None:
        pytest.skip(obstacle)
    assert set(load_backend("triton").ALGORITHMS) == {"merged", "split", "fused"}
    check(case, "triton")


@share(0.2)
@given(
    leading=st.lists(st.integers(0, 3), max_size=3),
    algorithm=st.sampled_from(("auto", *eager.ALGORITHMS)),
    seed=st.integers(0, 100),
)
def test_leading_dimensions(leading: list[int], algorithm: str, seed: int) -> None:
    p = make_problem(tokens=int(torch.Size(leading).numel()), out_features=6, in_features=5, seed=seed)
    flat = p.run(algorithm=algorithm)[0]
    y = smoa_linear(
        p.x.view(*leading, 5),
        p.weight,
        p.bias,
        p.A,
        p.B,
        p.partition,
        p.ranks,
        scaling=p.scaling,
        algorithm=algorithm,
    )
    assert torch.equal(y, flat.view(*leading, 6))
