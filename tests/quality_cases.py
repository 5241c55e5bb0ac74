"""A tiny model, its questions and a made-up record for tests of the quality study."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from questions import Question, Splits
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.quality.methods import ALL, BY_NAME
from benchmarks.quality.models import CutModel, Upper
from benchmarks.quality.store import BEFORE
from benchmarks.quality.tasks import TASKS

COLOURS = [Question(f"what colour is {thing} number {i}", colour) for i in range(8) for thing, colour in
           (("grass", "green"), ("sky", "blue"), ("snow", "white"))]  # fmt: skip


class Body(nn.Module):
    """Two linear layers in place of a model's upper layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return BaseModelOutput(self.second(torch.relu(self.first(inputs_embeds))))


class Words(nn.Module):
    """Embeddings, in place of everything below the upper layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(128, 16)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return BaseModelOutput(self.words(input_ids))


def letters(prompts: list[str], **_: Any) -> Any:
    """A tokenizer with one token per letter."""
    return type("Encoding", (), {"input_ids": [[ord(c) for c in prompt] for prompt in prompts]})


TARGETS = {
    ALL: r".*\.(first|second)",
    "query and value": r".*\.first",
    "attention": r".*\.first",
    "MLP": r".*\.second",
}


def tiny(classes: Any, layers: int) -> CutModel:
    torch.manual_seed(0)
    upper = Upper(Body(), nn.Linear(16, len(classes)), causal=False)
    tokenizer: Any = letters
    return CutModel(Words(), upper, tokenizer, classes, TARGETS, new_head=True)


TINY = replace(TASKS["trec50"], read=lambda: COLOURS, cut=tiny, steps=4, batch_size=4)


SPLITS = Splits(COLOURS[:12], COLOURS[12:18], COLOURS[18:])


def record(
    method: str, stage: str, lr: float, seed: int, accuracy: float, loss: float = 1.0
) -> dict[str, Any]:
    known = BY_NAME[method]
    return {
        "task": "trec50", "method": method, "stage": stage, "lr": lr, "seed": seed, "accuracy": accuracy,
        "evaluation_loss": loss, "questions": 500, "r": known.r, "parameters": 100 * known.r // known.num_blocks,
        "steps": 60, "batch_size": 16, "layers": 2, "dtype": "float32", "data": "abc", "num_blocks": known.num_blocks,
        "random": known.random, "head_lr": 0.01, **BEFORE,
        "step_seconds": 0.1, "seconds": 6.0, "rank": 0.5, "effective_rank": 0.25, "commit": "abc",
        "machine": {"device": "a CPU", "threads": 1, "versions": {"torch": "2"}},
    }  # fmt: skip
