"""Helpers of the merging tests: adapters that look trained, and models loaded again."""

import copy

import torch
from peft import HiraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from smoa_kernels.peft import SMoAConfig


def trained(model, config, folder):
    """Save an adapter in which every trained parameter has changed."""
    model = get_peft_model(model, copy.deepcopy(config))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    model.save_pretrained(folder)
    return model.eval()


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def smoa(**settings):
    return SMoAConfig(**{"r": 4, "target_modules": ["q_proj"], "init_weights": False, **settings})


def hira(**settings):
    return HiraConfig(
        **{"r": 4, "target_modules": ["q_proj", "down_proj"], "init_weights": False, **settings}
    )
