"""The models of the benchmarks: the real SmolLM2-135M, and a tiny one of the same kind for `--smoke`."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from smollm2 import NAME, cached_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from smoa_kernels.peft import SMoAConfig

from .protocol import DEVICE
from .providers import HIRA, LORA, SMOA

RANK = 8
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]

TINY = LlamaConfig(
    vocab_size=256,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=3,
)


def model_name(smoke: bool) -> str:
    """The name of the model that `base_model` returns."""
    return "a tiny model with random weights" if smoke else NAME


def base_model(smoke: bool) -> PreTrainedModel:
    """A frozen SmolLM2-135M from its installed package, or a tiny model of the same kind.

    If the package is missing, skips the benchmark and says what to install; no other model replaces it.
    """
    if smoke:
        torch.manual_seed(0)
        model = LlamaForCausalLM(TINY)
    else:
        try:
            folder = cached_model()
        except FileNotFoundError as missing:
            pytest.skip(f"SmolLM2-135M is not installed: {missing}")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.requires_grad_(False).to(DEVICE)


def adapter_configs(num_blocks: int) -> dict[str, peft.PeftConfig]:
    """The three adapters at equal rank."""
    shared: dict[str, Any] = {"r": RANK, "target_modules": TARGETS}
    return {
        LORA: peft.LoraConfig(**shared),
        HIRA: peft.HiraConfig(**shared),
        SMOA: SMoAConfig(**shared, num_blocks=num_blocks),
    }
