"""A whole training step of SmolLM2-135M, forward, backward and AdamW: LoRA, HiRA, the same accelerated, and SMoA.

The weights are the real model's, the tokens random; `make finetune` times it on real data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from smoa_kernels.peft import accelerate_hira, decelerate_hira
from smoa_kernels.peft.hira.accelerate import Accelerated
from smoa_kernels.peft.layer import SMoALayer

from .cases import skip_what_loops_multiply
from .conftest import Measure
from .gate import RedGateError
from .memory import allocated
from .models import RANK, adapter_configs, base_model, model_name
from .protocol import DEVICE, timed
from .providers import ACCELERATED, BF16, HIRA, LORA, fill, name_of

BATCH, LENGTH = 16, 32


def adapted(
    config: peft.PeftConfig, smoke: bool, dtype: torch.dtype = torch.float32, float32_factors: bool = True
) -> nn.Module:
    """A model with a new adapter whose B is nonzero, so that there is something to check.

    Its factors are in float32, as PEFT makes them for any base, or in the base's dtype.
    """
    model: nn.Module = peft.get_peft_model(
        base_model(smoke).to(dtype), config, autocast_adapter_dtype=float32_factors
    )
    fill(model, std=0.01)
    return model


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross-entropy of the last position, as in fine-tuning on one-word answers (`examples/training.py`)."""
    logits = model(tokens[:, :-1], logits_to_keep=torch.tensor([-1])).logits[:, -1]
    return nn.functional.cross_entropy(logits, tokens[:, -1])


def training_step(model: nn.Module, tokens: Tensor) -> Callable[[], None]:
    """One step: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model, tokens).backward()
        optimizer.step()

    return step


def gradient_error(model: nn.Module, tokens: Tensor) -> float:
    """Relative error of all the adapter's gradients together against the same model in float64.

    Ours runs its plain PyTorch definition there, PEFT's adapters their own code.
    """
    exact = copy.deepcopy(model).double()
    if any(isinstance(module, Accelerated) for module in exact.modules()):
        decelerate_hira(exact)
    for module in exact.modules():
        if isinstance(module, SMoALayer):
            for settings in module.settings.values():
                settings.backend = "reference"
    found = []
    for each in (model, exact):
        wanted = [p for p in each.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss_of(each, tokens), wanted)
        found.append(torch.cat([g.flatten().double() for g in gradients]))
    return float((found[0] - found[1]).norm() / found[1].norm())


def check_gradients(models: dict[str, nn.Module], tokens: Tensor) -> None:
    """The gate: the error of each adapter's gradients is at most twice the largest error of the others.

    No formula gives the rounding error of thirty layers, so the adapters are compared with each other.
    """
    errors = {name: gradient_error(model, tokens) for name, model in models.items()}
    for name, error in errors.items():
        budget = max(other for peer, other in errors.items() if peer != name)
        if not error <= 2 * budget:
            raise RedGateError(
                f"gradients of {name} err by {error:.1e}, more than twice the others' own {budget:.1e}"
            )


@pytest.mark.parametrize(
    ("blocks", "dtype", "float32_factors"),
    [
        pytest.param(2, torch.float32, True, id="float32, the recommended setting"),
        pytest.param(2, BF16, True, id="bfloat16, the recommended setting"),
        pytest.param(4, torch.float32, True, id="float32"),
        pytest.param(4, BF16, True, id="bfloat16"),
        pytest.param(4, BF16, False, id="bfloat16 factors"),
    ],
)
def test_step(blocks: int, dtype: torch.dtype, float32_factors: bool, smoke: bool, measure: Measure) -> None:
    skip_what_loops_multiply(BATCH * LENGTH * 135_000_000, dtype, smoke)  # once for each weight and token
    configs = adapter_configs(blocks)
    configs[ACCELERATED] = configs[HIRA]
    models: dict[str, Any] = {
        name: adapted(config, smoke, dtype, float32_factors) for name, config in configs.items()
    }
    accelerate_hira(models[ACCELERATED])
    vocabulary = models[LORA].config.vocab_size
    torch.manual_seed(2)
    tokens = torch.randint(vocabulary, (BATCH, LENGTH + 1), device=DEVICE)
    check_gradients(models, tokens[:2])
    steps = {name: training_step(model, tokens) for name, model in models.items()}
    for step in steps.values():
        step()  # creates the optimizer's state before memory is counted, and warms up
    peaks = {name: allocated(step)[0] for name, step in steps.items()}
    others = {} if float32_factors else {"factors": name_of(dtype)}
    measure(
        "step",
        f"training step: {model_name(smoke)}, {name_of(dtype)}{' factors too' if others else ''}, "
        f"{BATCH} x {LENGTH} tokens, r={RANK}, K={blocks}",
        {
            "model": model_name(smoke),
            "batch": BATCH,
            "length": LENGTH,
            "rank": RANK,
            "num_blocks": blocks,
            "dtype": name_of(dtype),
            **others,
        },
        {name: timed("step", step) for name, step in steps.items()},
        baseline=LORA,
        budget=25,
        least=5,
        warmup=0,
        bytes={name: {"peak": peak} for name, peak in peaks.items()},
    )
