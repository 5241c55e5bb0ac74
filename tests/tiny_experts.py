"""Tiny models with experts, one for each kind of transformers' decorator for experts, and their adapters."""

import torch
from peft import get_peft_model
from tiny_models import LLAMA
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from smoa_kernels.peft import ExpertsWeight, SMoAConfig

SIZES = {
    **LLAMA,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROUTED = {"n_routed_experts": 6, "first_k_dense_replace": 0}
ROUTED |= dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1)
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
KINDS = {
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 24, "head_dim": 8},
    "mixtral": {"num_local_experts": 6},
    "olmoe": {"num_experts": 6},
    "deepseek_v3": {**ROUTED, **LATENT, "moe_intermediate_size": 24, "num_key_value_heads": 4},
    "glm4_moe": {**ROUTED, "moe_intermediate_size": 24, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 6, "head_dim": 8, "layer_types": ["full_attention"] * 2},
    # has_gate=False
    "nemotron_h": {
        **ROUTED,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24,
        "head_dim": 8,
        "layers_block_type": ["attention", "moe"],
        "moe_latent_size": None,
    },
}


def tiny_experts(kind="qwen3_moe", seed=0, **settings):
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[kind](**{**SIZES, **KINDS[kind], **settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:  # some classes leave them uninitialised
                parameter.normal_(0, 0.1)
    return model


def fused(model):
    """The names of a model's fused weights, relative to a decoder layer."""
    names = {
        name.partition("layers.")[2].partition(".")[2]
        for name, parameter in model.named_parameters()
        if ".experts." in name and parameter.ndim == 3
    }
    return sorted(names)


BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def config(model=None, **settings):
    targets = fused(model) if model is not None else BOTH
    defaults = {"r": 5, "num_blocks": 3, "target_parameters": targets, "init_weights": False}
    return SMoAConfig(**{**defaults, **settings})


def adapt(model, name="default", **settings):
    return get_peft_model(model, config(model, **settings), adapter_name=name).eval()


def weights(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertsWeight)}
