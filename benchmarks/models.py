"""Models of real shapes with random weights, so that nothing is downloaded: a step's time does not depend on them."""

from __future__ import annotations

from typing import Any

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from smoa_kernels.peft import SMoAConfig

from .protocol import DEVICE
from .providers import HIRA, LORA, SMOA

RANK = 8
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


def base_model(smoke: bool) -> LlamaForCausalLM:
    """A frozen SmolLM2-135M, or a tiny model of the same kind."""
    torch.manual_seed(0)
    return LlamaForCausalLM(TINY if smoke else SMOLLM2_135M).requires_grad_(False).to(DEVICE)


def adapter_configs(num_blocks: int) -> dict[str, peft.PeftConfig]:
    """The three adapters at equal rank."""
    shared: dict[str, Any] = {"r": RANK, "target_modules": TARGETS}
    return {
        LORA: peft.LoraConfig(**shared),
        HIRA: peft.HiraConfig(**shared),
        SMOA: SMoAConfig(**shared, num_blocks=num_blocks),
    }
