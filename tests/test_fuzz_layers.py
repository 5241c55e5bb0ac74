"""`FusedSMoALinear` against the C oracle, on weights that nobody picked: blocks, output, merged output."""

from __future__ import annotations

from dataclasses import replace

import c_oracle
import pytest
import torch
from draws import given, share, st
from fuzzed import absolute, allowed, compare, compare_blocks, problems
from problems import DEVICE, DTYPES, LinearProblem, obstacle
from torch import Tensor

pytestmark = pytest.mark.numerical


def definition(p: LinearProblem) -> Tensor:
    """ΔW by the oracle."""
    tensors = (p.weight, p.A, p.B, p.partition.row_block, p.partition.col_block)
    found = c_oracle.delta_weight(*(t.double() for t in tensors), p.ranks, scaling=p.scaling)
    return torch.from_numpy(found).to(DEVICE)


def check(p: LinearProblem, *, spectral: bool, **settings: object) -> None:
    layer = p.layer(**settings)
    p = replace(p, weight=p.weight.clone())  # the layer's own is merged in place
    compare_blocks(layer.partition, p.weight)
    if spectral:
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
@given(p=problems(DTYPES, of_a_layer=True), spectral=st.booleans())
def test_eager(p: LinearProblem, spectral: bool) -> None:
    check(p, spectral=spectral, backend="eager")


@share(0.03)
@given(p=problems(DTYPES[1:], of_a_layer=True), spectral=st.booleans())
@pytest.mark.slow
def test_triton(p: LinearProblem, spectral: bool) -> None:
    if (reason := obstacle("triton")) is not None:
        pytest.skip(reason)
    check(p, spectral=spectral, backend="triton")
