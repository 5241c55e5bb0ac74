"""Forward, backward and both, over a frozen linear layer: PEFT's LoRA and HiRA, the paper's way, and ours."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from protocol import compare, timed
from providers import Case, PaperDense, check, frozen, hira, lora, smoa
from torch import nn

CASES = [
    Case(2048, 2048, 2048, 4, 16),
    Case(2048, 2048, 2048, 8, 16),
    Case(2048, 2048, 2048, 1, 16),
    Case(2048, 2048, 2048, 4, 16, dropout=0.05),
    Case(2048, 2048, 2048, 4, 16, torch.bfloat16),
    Case(128, 384, 1536, 2, 16),
    Case(256, 576, 1536, 2, 8),
]


def forward(layer: nn.Module, case: Case) -> Callable[[], float]:
    """Seconds of a forward that records for backward."""
    x = case.input()
    return lambda: timed(lambda: layer(x))


def backward(layer: nn.Module, case: Case) -> Callable[[], float]:
    """Seconds of the backward alone: the forward before it is not timed."""
    x = case.input()
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def run() -> float:
        y = layer(x)
        dy = torch.ones_like(y)
        return timed(lambda: torch.autograd.grad(y, wanted, dy))

    return run


def both(layer: nn.Module, case: Case) -> Callable[[], float]:
    """Seconds of forward and backward."""
    x = case.input()
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    dy = torch.ones(case.tokens, case.out_features, dtype=case.dtype)
    return lambda: timed(lambda: torch.autograd.grad(layer(x), wanted, dy))


@pytest.mark.parametrize("phase", [forward, backward, both], ids=lambda phase: phase.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_over_frozen(case: Case, phase: Callable, smoke: bool, benchmark, report) -> None:
    if smoke:
        case = case.smoke()
    providers = {"frozen": frozen, "PEFT LoRA": lora, "PEFT HiRA": hira, "smoa split": smoa("split")}
    if not case.dropout:
        # With dropout the adapter sees another x than the base, so only split exists.
        providers |= {"paper, dense": PaperDense, "smoa merged": smoa("merged")}
    layers = {name: provider(case) for name, provider in providers.items()}
    for name, layer in layers.items():
        if name.startswith("smoa"):
            check(case, layer)
    runs = {name: phase(layer, case) for name, layer in layers.items()}
    comparison = benchmark.pedantic(
        lambda: compare(runs, baseline="frozen", rounds=2 if smoke else 9), rounds=1, iterations=1
    )
    report(f"{phase.__name__}: {case}", comparison)
