"""Problems drawn at random, and the C oracle's answers to them.

A result may differ from the oracle's by a few roundings of its own dtype, relative to the oracle's result for the
absolute values of all inputs. So a sum that cancels is judged by the size of its terms.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import c_oracle
import numpy as np
import torch
from draws import st
from problems import DEVICE, LAYOUTS, LinearProblem, make_problem
from torch import Tensor

from smoa_kernels import BlockPartition
from smoa_kernels.checks import granules

ROUNDINGS = 8


@st.composite
def rules(draw: st.DrawFn, shape: tuple[int, ...], num_blocks: int) -> dict[str, Any]:
    """A block order, and a granule that gives at least one granule of rows and of columns to each block."""
    fit = [granule for granule in (1, 2, 3, 4, 8, 16) if granules(min(shape), granule) >= num_blocks]
    order = draw(st.sampled_from(["spectral", "contiguous", "random"]))
    return {"block_order": order, "granule": draw(st.sampled_from(fit))}


@st.composite
def problems(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], *, of_a_layer: bool = False) -> LinearProblem:
    """A problem of any dtype and strides, with blocks of any order and granule or with random labels.

    A layer's problem has no more blocks than rows or columns, and a rank above 0.
    """
    out_features, in_features = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    random_labels = draw(st.booleans())
    most = 5 if random_labels and not of_a_layer else min(5, out_features, in_features)
    ranks = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 17]), min_size=1, max_size=most))
    made = {} if random_labels else draw(rules((out_features, in_features), len(ranks)))
    exact = make_problem(
        tokens=draw(st.integers(0, 20)),
        out_features=out_features,
        in_features=in_features,
        ranks=(ranks[0] or 1, *ranks[1:]) if of_a_layer else tuple(ranks),
        bias=draw(st.booleans()),
        random_labels=random_labels,
        **made,
        seed=draw(st.integers(0, 10_000)),
    )
    dtype = draw(st.sampled_from(dtypes))
    rounded = exact.to(dtype, draw(st.sampled_from([dtype, torch.promote_types(dtype, torch.float32)])))
    layout = st.sampled_from(sorted(LAYOUTS.keys() - {"negated"}))  # numpy refuses negated views
    matrices = "x", "weight", "A", "B", "dy"
    strided = {name: LAYOUTS[draw(layout)](getattr(rounded, name)) for name in matrices}
    for name, value in strided.items():
        assert torch.equal(value, getattr(rounded, name))
    return replace(rounded, **strided)


def oracle(p: LinearProblem, mask: Tensor | None = None) -> tuple[Tensor, ...]:
    """y, dX, dA and dB in float64 from the C code; if there is a bias also dbias, a plain sum."""
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


def compare_blocks(partition: BlockPartition, weight: Tensor, block_order: str, granule: int) -> None:
    """Blocks are the oracle's: whole granules, the same cuts, and spectral order up to rounding of the scores."""
    U, sigma, Vh = np.linalg.svd(weight.detach().double().cpu().numpy(), full_matrices=False)
    orders = c_oracle.spectral_orders(U, sigma, Vh.T, granule)
    rounding = 1e-8 if weight.dtype == torch.float64 else 1e-2
    for labels, scores in (
        (partition.row_block, orders.row_score),
        (partition.col_block, orders.col_score),
    ):
        ours = labels.cpu().numpy()
        found = ours[::granule]
        # Rebuild a granule order from the labels; contiguous blocks have only one.
        order = np.arange(found.size) if block_order == "contiguous" else np.argsort(found, kind="stable")
        expected = c_oracle.block_labels(order, partition.num_blocks, ours.size, granule)
        np.testing.assert_array_equal(ours, expected)
        if block_order == "spectral":
            for lower, upper in pairwise(scores[found == k] for k in range(partition.num_blocks)):
                assert lower.max() <= upper.min() + rounding
