"""A tiny Qwen3-MoE with random weights, that of `examples/finetune_moe.py`, whose experts are adapted."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import finetune_moe
import torch
import trec
from peft import LoraConfig, PeftConfig, get_peft_model
from questions import Question, split
from torch import Tensor, nn
from transformers import Qwen3MoeModel

from smoa_kernels.peft import SMoAConfig

from .methods import Method
from .models import CutModel, Upper, halve


class ExpertsModel(CutModel):
    """A model whose experts carry LoRA or SMoA; its tokenizer is the number of each known word."""

    def adapt(self, method: Method, model: nn.Module, seed: int) -> nn.Module:
        """Return the model with a method's adapter on its experts, its base frozen."""
        model.requires_grad_(False)
        if method.kind == "none":
            return model
        shared: dict[str, Any] = {
            "r": method.r,
            "target_modules": [],
            "target_parameters": finetune_moe.TARGETS,
        }
        config: PeftConfig = LoraConfig(lora_alpha=method.r, **shared)
        if method.kind == "smoa":
            config = SMoAConfig(num_blocks=method.num_blocks, block_order=method.block_order, **shared)
        adapted: nn.Module = get_peft_model(model, config)
        return adapted

    def spectrum(self, model: nn.Module) -> dict[str, float]:
        """Nothing: an update of experts is a stack of matrices."""
        return {}

    def tokens(self, questions: Sequence[Question]) -> list[tuple[Tensor, Tensor]]:
        """Return each question's words, by number, and their layout: 1 for each."""
        rows = [torch.tensor(row["input_ids"]) for row in finetune_moe.encode(self.tokenizer, questions)]
        rows = [row[row != finetune_moe.PADDING] for row in rows]
        return [(row, torch.ones_like(row)) for row in rows]


def cut_experts(classes: Sequence[str], layers: int) -> CutModel:
    """The model, of which all layers are adapted: only its embeddings lie below. The base is the same in every run."""
    words = finetune_moe.vocabulary(split(trec.read(trec.locate())).train)
    torch.manual_seed(0)
    body = Qwen3MoeModel(finetune_moe.model_config(len(words) + 2))
    lower = copy.deepcopy(body)
    halve(lower, body, layers)
    upper = Upper(body, nn.Linear(body.config.hidden_size, len(classes)), causal=True)
    return ExpertsModel(lower, upper, words, classes, {}, new_head=True)
