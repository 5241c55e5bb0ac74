"""PEFT's merged layers against the C oracle on random problems: before merging, after it, and unloaded."""

from dataclasses import replace

import pytest
import torch
from draws import given, share, st
from fuzzed import compare, problems
from peft import get_peft_model
from problems import DTYPES, LinearProblem
from torch import nn
from transformers.pytorch_utils import Conv1D

from smoa_kernels.definition.packed import PackedAdapter, scaling_tensor
from smoa_kernels.peft import SMoAConfig

pytestmark = [pytest.mark.numerical, pytest.mark.slow]


def base_of(p: LinearProblem, conv1d: bool) -> nn.Module:
    """The base layer alone, as in a model. A Conv1D always has a bias; it may be zero."""
    (out_features, in_features), bias = p.weight.shape, p.bias
    if conv1d:
        layer = Conv1D(out_features, in_features)
        bias = p.weight.new_zeros(out_features) if bias is None else bias
    else:
        layer = nn.Linear(in_features, out_features, bias=bias is not None)
    layer.weight = nn.Parameter(p.weight.T if conv1d else p.weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return nn.Sequential(layer)


@share(0.15)
@given(p=problems(DTYPES, of_a_layer=True), conv1d=st.booleans(), safe=st.booleans())
def test_a_merged_layer(p: LinearProblem, conv1d: bool, safe: bool) -> None:
    ranks = p.ranks.tolist()
    config = SMoAConfig(
        r=sum(ranks),
        num_blocks=len(ranks),
        block_ranks=ranks,
        smoa_alpha=p.scaling * sum(ranks),
        target_modules=["0"],
        fan_in_fan_out=conv1d,
    )
    model = get_peft_model(base_of(p, conv1d), config).eval()
    p = replace(p, weight=p.weight.clone())  # merging writes to the base layer's weight in place
    layer = model.base_model.model[0]
    layer.fill(
        "default",
        PackedAdapter(p.weight, p.A, p.B, p.partition, p.ranks, scaling_tensor(p.scaling, p.x.device)),
        "default",
    )
    with torch.no_grad():
        y = model(p.x)
        compare([y], p)
        model.merge_adapter(safe_merge=safe)
        assert layer.merged
        compare([model(p.x)], p)
        model.unmerge_adapter()
        assert torch.equal(layer.base_weight(), p.weight)
        assert torch.equal(model(p.x), y)
        compare([model.merge_and_unload()(p.x)], p)
