"""Tiny models made from a config: nothing is downloaded."""

from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

STEPS_ALONE = {
    **{"lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no"},
    **{"report_to": [], "disable_tqdm": True, "seed": 3},
}
"""Arguments of a Trainer that does nothing beside its steps, and logs the loss of each."""
LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5 = {"vocab_size": 64, "d_model": 32, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 4}
GPT2_QUIET = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


def tiny_llama(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **settings})).eval()


def tiny_gpt2(seed: int = 0, **settings: Any) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**{**GPT2, **GPT2_QUIET, **settings})).eval()


def tiny_t5(kind: Any = T5ForConditionalGeneration) -> Any:
    torch.manual_seed(0)
    return kind(T5Config(**T5, decoder_start_token_id=0)).eval()
