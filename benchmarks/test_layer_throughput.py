"""Forward, backward and both, over a frozen linear layer: PEFT's LoRA and HiRA, the paper's way, and ours."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from smoa_kernels.backends.eager import choose_algorithm
from smoa_kernels.definition.precision import has_gemm

from .cases import BF16, LAYERS, skip_what_loops_multiply
from .conftest import Measure
from .gate import check_layers
from .protocol import DEVICE, Run, laps
from .providers import FROZEN, Case, layer_providers
from .rotation import Inputs


def training_pass(layer: nn.Module, case: Case, inputs: Inputs | None = None) -> Run:
    """Seconds of a forward that records for backward, of the backward alone, and of both.

    Args:
        layer: what is run.
        case: its problem.
        inputs: each pass takes the next; left out, every pass takes the same.
    """
    turns = inputs or itertools.repeat((case.input(), case.output_gradient()))
    trained = [p for p in layer.parameters() if p.requires_grad]

    def run() -> dict[str, float]:
        x, dy = next(turns)
        wanted = [x, *trained]
        outputs: list[torch.Tensor] = []
        forward, backward = laps(
            lambda: outputs.append(layer(x)), lambda: torch.autograd.grad(outputs[0], wanted, dy)
        )
        return {"forward": forward, "backward": backward, "both": forward + backward}

    return run


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_over_frozen(case: Case, smoke: bool, measure: Measure) -> None:
    title, params = f"layer: {case}", case.record()
    skip_what_loops_multiply(case.multiplications, case.dtype, smoke)
    if smoke:
        case = case.smoke()
    algorithms = (
        ["auto", "split"] if case.dropout else ["auto", "merged", "split"]
    )  # under dropout none is merged
    if DEVICE.type == "cpu":  # what "auto" means is not timed twice
        ieee = case.dtype != BF16 or not has_gemm(BF16)  # widened, it is as in float32
        algorithms.remove(choose_algorithm(case.tokens, case.rank, ieee=ieee, dropout=bool(case.dropout)))
    layers = {name: build(case) for name, build in layer_providers(case, algorithms).items()}
    check_layers(case, layers)
    runs = {name: training_pass(layer, case) for name, layer in layers.items()}
    measure("layer", title, params, runs, baseline=FROZEN, budget=12, warmup=1)
