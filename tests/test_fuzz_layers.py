"""`FusedSMoALinear` against the C oracle, on weights that nobody picked: blocks, output, merged output."""

from __future__ import annotations

from dataclasses import replace

import c_oracle
import pytest
import torch
from draws import given, share, st
from fuzzed import DTYPES, absolute, allowed, compare, compare_blocks, problems
from problems import DEVICE, LinearProblem
from torch import Tensor, nn

from smoa_kernels import FusedSMoALinear
from smoa_kernels.backends import triton_obstacle

pytestmark = pytest.mark.numerical


def layer_of(p: LinearProblem, **settings: object) -> FusedSMoALinear:
    """A layer that computes the problem, with blocks of its own."""
    base = nn.Linear(p.x.shape[1], p.dy.shape[1], bias=p.bias is not None, dtype=p.x.dtype)
    base.weight = nn.Parameter(p.weight)
    if p.bias is not None:
        base.bias = nn.Parameter(p.bias)
    ranks = p.ranks.tolist()
    layer = FusedSMoALinear.from_linear(
        base, r=sum(ranks), num_blocks=len(ranks), alpha=p.scaling * sum(ranks), block_ranks=ranks, **settings
    )
    layer.smoa_A, layer.smoa_B = nn.Parameter(p.A), nn.Parameter(p.B)
    return layer


def definition(p: LinearProblem) -> Tensor:
    """ΔW by the oracle."""
    tensors = (p.weight, p.A, p.B, p.partition.row_block, p.partition.col_block)
    found = c_oracle.delta_weight(*(t.double() for t in tensors), p.ranks, scaling=p.scaling)
    return torch.from_numpy(found).to(DEVICE)


def check(p: LinearProblem, *, spectral: bool, **settings: object) -> None:
    layer = layer_of(p, **settings)
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
def test_triton(p: LinearProblem, spectral: bool) -> None:
    if (obstacle := triton_obstacle(DEVICE)) is not None:
        pytest.skip(obstacle)
    check(p, spectral=spectral, backend="triton")
