"""A layer of experts: a training pass, its memory, and the forward of one token, beside PEFT's LoRA."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from .conftest import Measure
from .experts import ExpertsCase, checked
from .memory import allocated
from .protocol import halves, pass_seconds, timed
from .providers import FROZEN

# The first shape is small and shows the cost of a call; the second is Qwen3-30B-A3B's, with an eighth of its experts.
PAIRS = (
    *(ExpertsCase(pairs, 256, 512) for pairs in (16, 32, 128, 1024)),
    ExpertsCase(32, 2048, 768),
    ExpertsCase(32, 256, 512, dtype=torch.bfloat16),
)
ONE_TOKEN = (ExpertsCase(0, 256, 512), ExpertsCase(0, 2048, 768))


@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_training_pass(case: ExpertsCase, smoke: bool, measure: Measure) -> None:
    title, params = f"experts: {case}", case.record()
    case = case.smoke() if smoke else case
    layers = checked(case)
    memory = {}
    for name, layer in layers.items():
        forward, backward = halves(layer, case.inputs(), case.output_gradient())
        forward_peak, held = allocated(forward)
        memory[name] = {"peak": max(forward_peak, held + allocated(backward)[0])}
    runs = {
        name: partial(pass_seconds, layer, case.inputs(), case.output_gradient())
        for name, layer in layers.items()
    }
    measure("experts", title, params, runs, baseline=FROZEN, budget=10, bytes=memory)


@pytest.mark.parametrize("case", ONE_TOKEN, ids=str)
def test_one_token(case: ExpertsCase, smoke: bool, measure: Measure) -> None:
    title, params = f"one token through experts: {case}", case.record()
    case = case.smoke() if smoke else case
    layers = checked(case)
    x, *rest = case.inputs()
    runs = {
        name: timed("forward", torch.no_grad()(partial(layer, x.detach(), *rest)))
        for name, layer in layers.items()
    }
    measure("experts, one token", title, params, runs, baseline=FROZEN, budget=4, warmup=5)
