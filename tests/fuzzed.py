"""Problems drawn at random, and the C oracle's answers to them.

A result may differ from the oracle's by a few roundings of its own dtype, relative to the oracle's result for the
absolute values of all inputs. So a sum that cancels is judged by the size of its terms.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import c_oracle
import torch
from draws import st
from problems import DEVICE, LAYOUTS, LinearProblem, make_problem
from torch import Tensor

from smoa_kernels.checks import granules

ROUNDINGS = 8


@st.composite
def problems(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...]) -> LinearProblem:
    """A problem of any dtype and strides, with blocks of any order and granule or with random labels."""
    shape, random_labels = [draw(st.integers(1, 40)) for _ in range(2)], draw(st.booleans())
    most = 5 if random_labels else min(5, *shape)
    ranks = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 17]), min_size=1, max_size=most))
    made: dict[str, Any] = {}
    if not random_labels:  # at least one granule of rows and of columns for each block
        fit = [granule for granule in (1, 2, 3, 4, 8, 16) if granules(min(shape), granule) >= len(ranks)]
        order = draw(st.sampled_from(["spectral", "contiguous", "random"]))
        made = {"block_order": order, "granule": draw(st.sampled_from(fit))}
    exact = make_problem(
        tokens=draw(st.integers(0, 20)),
        out_features=shape[0],
        in_features=shape[1],
        ranks=tuple(ranks),
        bias=draw(st.booleans()),
        random_labels=random_labels,
        **made,
        seed=draw(st.integers(0, 10_000)),
    )
    dtype = draw(st.sampled_from(dtypes))
    rounded = exact.to(dtype, draw(st.sampled_from([dtype, torch.promote_types(dtype, torch.float32)])))
    layout = st.sampled_from(sorted(LAYOUTS.keys() - {"negated"}))  # numpy refuses negated views
    strided = {
        name: LAYOUTS[draw(layout)](getattr(rounded, name)) for name in ("x", "weight", "A", "B", "dy")
    }
    for name, value in strided.items():
        assert torch.equal(value, getattr(rounded, name))
    return replace(rounded, **strided)


def oracle(p: LinearProblem, mask: Tensor | None = None) -> tuple[Tensor, ...]:
    """y, dX, dA, dB and, if there is a bias, dbias in float64 from the C code; dbias is a plain sum."""
    found = tuple(torch.from_numpy(value).to(DEVICE) for value in c_oracle.run(p, mask))
    return found if p.bias is None else (*found, p.dy.double().sum(0))


def absolute(p: LinearProblem) -> LinearProblem:
    names = ("x", "weight", "bias", "A", "B", "dy")
    return replace(p, **{n: getattr(p, n).abs() for n in names if getattr(p, n) is not None})


def compare(found: Iterable[Tensor], p: LinearProblem, mask: Tensor | None = None) -> None:
    """Compare y, dX, dA, dB and dbias, as many as are given, with the oracle's results."""
    truth, size = oracle(p, mask), oracle(absolute(p), mask)
    for name, ours, exact, terms in zip(("y", "dX", "dA", "dB", "dbias"), found, truth, size, strict=False):
        assert ours.shape == exact.shape, name
        assert ((ours.double() - exact).abs() <= allowed(terms, ours.dtype, p.x.dtype)).all(), name


def allowed(terms: Tensor, *dtypes: torch.dtype) -> Tensor:
    """The allowed error of a sum with terms of this size, rounded to these dtypes."""
    infos = [torch.finfo(dtype) for dtype in dtypes]
    least = max(info.eps * info.smallest_normal for info in infos)
    return ROUNDINGS * (max(info.eps for info in infos) * terms + least)
