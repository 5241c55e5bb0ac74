"""The two models, cut below the layers that are adapted: what lies under them is frozen, so each question's way
through it is computed once for all runs. Without dropout this changes no result, and saves most of the time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import minilm
import smollm2
import torch
from questions import Encoder, Question
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

PREFIX_BATCH = 32


@dataclass(frozen=True)
class Batch:
    """Questions as the adapted layers take them.

    Shapes: ``hidden`` (questions, longest, width), ``mask`` (questions, longest), ``labels`` (questions,).
    """

    hidden: Tensor
    mask: Tensor
    labels: Tensor


class CutModel:
    """A model whose upper layers are adapted, and what it needs to answer.

    Args:
        lower: embeddings and frozen layers; its last hidden state is the upper layers' input.
        upper: takes ``inputs_embeds`` and returns the classes' logits.
        head: name of the new layer in ``upper`` that is trained in full; None where there is none.
        left: whether rows are padded on the left, so that the last position is the one that answers.
    """

    def __init__(
        self,
        lower: nn.Module,
        upper: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        classes: Sequence[str],
        targets: tuple[str, ...],
        head: str | None,
        left: bool,
    ) -> None:
        self.lower, self.upper = lower.eval(), upper.eval()
        self.tokenizer, self.classes, self.targets, self.head, self.left = (
            tokenizer,
            list(classes),
            targets,
            head,
            left,
        )
        self._known: dict[str, Tensor] = {}

    def fresh(self, seed: int) -> nn.Module:
        """Return the upper layers with a head drawn from the seed; frozen weights are shared, not copied."""
        torch.manual_seed(seed)
        head = set() if self.head is None else set(self.upper.get_submodule(self.head).parameters())
        memo = {id(p): p for p in self.upper.parameters() if p not in head}
        model = copy.deepcopy(self.upper, memo)
        if self.head is not None:
            layer: Any = model.get_submodule(self.head)
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        return model

    def batch(self, questions: Sequence[Question]) -> Batch:
        """Look the questions up, or compute what is new, and pad."""
        new = [q.prompt for q in questions if q.prompt not in self._known]
        for start in range(0, len(new), PREFIX_BATCH):
            self._compute(new[start : start + PREFIX_BATCH])
        rows = [self._known[question.prompt] for question in questions]
        labels = torch.tensor([self.classes.index(question.answer) for question in questions])
        return Batch(self._pad(rows), self._pad([torch.ones(len(row)) for row in rows]).long(), labels)

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return logits (questions, classes)."""
        extra = {"position_ids": positions(batch.mask), "logits_to_keep": 1} if self.left else {}
        logits: Tensor = model(inputs_embeds=batch.hidden, attention_mask=batch.mask, **extra).logits
        return logits[:, -1] if self.left else logits

    def _pad(self, rows: list[Tensor]) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_side="left" if self.left else "right")

    @torch.no_grad()
    def _compute(self, prompts: list[str]) -> None:
        rows = [
            torch.tensor(ids) for ids in self.tokenizer(prompts, truncation=True, max_length=128).input_ids
        ]
        ids, mask = self._pad(rows), self._pad([torch.ones(len(row)) for row in rows]).long()
        extra = {"position_ids": positions(mask)} if self.left else {}
        hidden = self.lower(input_ids=ids, attention_mask=mask, **extra).last_hidden_state
        for prompt, row, keep in zip(prompts, hidden, mask.bool(), strict=True):
            self._known[prompt] = row[keep].clone()


def positions(mask: Tensor) -> Tensor:
    """Positions that do not count the padding."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


class Given(nn.Module):
    """Stands where embeddings did: the hidden state comes ready."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        """Return what was given."""
        return inputs_embeds


def cut_minilm(classes: Sequence[str], layers: int) -> CutModel:
    """all-MiniLM-L6-v2 with a new classification head; its upper ``layers`` of 6, and the pooler, are adapted."""
    folder = minilm.locate()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lower = AutoModel.from_pretrained(folder, dtype=torch.float32)
    lower.encoder.layer = lower.encoder.layer[:-layers]
    upper = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(classes), dtype=torch.float32
    )
    upper.bert.encoder.layer = upper.bert.encoder.layer[-layers:]
    upper.bert.embeddings = Given()
    return CutModel(lower, upper, tokenizer, classes, ("query", "key", "value", "dense"), "classifier", False)


def cut_smollm2(classes: Sequence[str], layers: int) -> CutModel:
    """SmolLM2-135M; its upper ``layers`` of 30 are adapted. Of the vocabulary only the answers' first tokens are scored."""
    folder = smollm2.cached_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lower = AutoModel.from_pretrained(folder, dtype=torch.float32)
    lower.layers = lower.layers[:-layers]
    lower.config.num_hidden_layers = len(lower.layers)
    lower.norm = nn.Identity()
    upper = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    upper.model.layers = upper.model.layers[-layers:]
    upper.model.embed_tokens = Given()
    encoder = Encoder(tokenizer, set(classes), 2048)
    answers = nn.Linear(upper.config.hidden_size, len(classes), bias=False)
    answers.weight = nn.Parameter(upper.lm_head.weight[encoder.answer_tokens].detach().clone())
    upper.lm_head = answers
    targets = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    return CutModel(lower, upper, tokenizer, encoder.answers, targets, None, True)
