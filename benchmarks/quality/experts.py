"""A tiny Qwen3-MoE with random weights, that of `examples/finetune_moe.py`, whose experts are adapted."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import finetune_moe
import torch
import trec
from questions import Question, split
from torch import Tensor, nn
from transformers import Qwen3MoeModel

from .methods import Method
from .models import CutModel, Upper, halve


class ExpertsModel(CutModel):
    """A model whose experts carry LoRA or SMoA; its tokenizer is the number of each known word."""

    def adapt(self, method: Method, model: nn.Module, seed: int) -> nn.Module:
        """Return the model with a method's adapter on its experts, its base frozen."""
        return method.adapt(model, {"target_modules": [], "target_parameters": finetune_moe.TARGETS}, seed)

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
