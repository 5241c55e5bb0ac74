"""Decode: one layer's forward for a few tokens, where building anything of W0's size would dominate.

Measures the thresholds up to which `auto` takes the expanded form (in `backends/`: `eager.py`, `native/backend.py`).
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from .cases import FEW_TOKENS
from .conftest import Measure
from .gate import check_layers
from .protocol import Run, timed
from .providers import DEFAULT_HIRA, FROZEN, HIRA, PAPER, Case, few_token_algorithms, layer_providers


@pytest.mark.parametrize("case", FEW_TOKENS, ids=str)
def test_forward(case: Case, smoke: bool, measure: Measure) -> None:
    title, params = f"few tokens: {case}", case.record()
    if smoke:
        case = case.smoke()
    providers = layer_providers(case, few_token_algorithms())
    # They build a dense weight for every token; the layer's benchmark times them.
    dense = (HIRA, DEFAULT_HIRA, PAPER)
    layers = {name: build(case) for name, build in providers.items() if name not in dense}
    check_layers(case, layers)
    runs = {name: forward(layer, case) for name, layer in layers.items()}
    measure("few tokens", title, params, runs, baseline=FROZEN, budget=2, warmup=5)


def forward(layer: nn.Module, case: Case) -> Run:
    """Seconds of a forward that records nothing."""
    x = case.input().detach()

    def run() -> None:
        with torch.no_grad():
            layer(x)

    return timed("forward", run)
