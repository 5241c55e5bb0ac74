"""A whole training step of a SmolLM2-135M-shaped model: LoRA, HiRA and SMoA at equal r.

The weights are random (a step's time does not depend on them), so nothing is downloaded. `make finetune` times the
real model on real data.
"""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
from protocol import compare, timed
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from smoa_kernels.peft import SMoAConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
SMOLLM2_135M = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
TINY = LlamaConfig(
    vocab_size=256,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=3,
)


def training_step(config: LlamaConfig, adapter: peft.PeftConfig | None, batch: int, length: int) -> Callable:
    """One step: forward on the last position, backward, AdamW."""
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(config).requires_grad_(False)
    if adapter is not None:
        model = peft.get_peft_model(model, adapter)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    tokens = torch.randint(config.vocab_size, (batch, length))
    labels = torch.randint(config.vocab_size, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        logits = model(tokens, logits_to_keep=1).logits[:, -1]
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()

    return step


@pytest.mark.parametrize(("batch", "length", "blocks"), [(16, 16, 2), (16, 32, 4)])
def test_step(batch: int, length: int, blocks: int, smoke: bool, benchmark, report) -> None:
    config = TINY if smoke else SMOLLM2_135M
    adapters = {
        "PEFT LoRA": peft.LoraConfig(r=8, target_modules=TARGETS),
        "PEFT HiRA": peft.HiraConfig(r=8, target_modules=TARGETS),
        f"smoa K={blocks}": SMoAConfig(r=8, num_blocks=blocks, target_modules=TARGETS),
    }
    steps = {name: training_step(config, adapter, batch, length) for name, adapter in adapters.items()}
    runs = {name: lambda step=step: timed(step) for name, step in steps.items()}
    comparison = benchmark.pedantic(
        lambda: compare(runs, baseline="PEFT LoRA", rounds=2 if smoke else 7), rounds=1, iterations=1
    )
    report(f"training step, SmolLM2-135M shape, {batch} x {length} tokens, r=8", comparison)
