"""Decode: one layer's forward for a few tokens, where building anything of W0's size would dominate.

Measures the threshold up to which `auto` takes the expanded form (smoa_kernels/eager.py).
"""

from __future__ import annotations

import pytest
import torch
from protocol import compare, timed
from providers import Case, check, frozen, lora, smoa
from torch import nn


@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_forward(dtype: torch.dtype, tokens: int, smoke: bool, benchmark, report) -> None:
    case = Case(tokens, 2048, 2048, 4, 8, dtype)
    if smoke:
        case = case.smoke()
    algorithms = ("merged", "split", "expanded", "auto")
    layers: dict[str, nn.Module] = {"frozen": frozen(case), "PEFT LoRA": lora(case)}
    layers |= {f"smoa {name}": smoa(name)(case) for name in algorithms}
    check(case, layers["smoa auto"])
    x = case.input().detach()

    def forward(layer: nn.Module) -> object:
        with torch.no_grad():
            return layer(x)

    runs = {name: lambda layer=layer: timed(lambda: forward(layer)) for name, layer in layers.items()}
    comparison = benchmark.pedantic(
        lambda: compare(runs, baseline="frozen", rounds=2 if smoke else 40, warmup=5), rounds=1, iterations=1
    )
    report(f"few tokens, forward: {case}", comparison)
