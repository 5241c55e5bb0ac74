"""The two models, cut below the layers that are adapted: what lies under them is frozen, so each question's way
through it is computed once for all runs. Without dropout this changes no result, and saves most of the time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from questions import Encoder, Question
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModel,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from examples import minilm, smollm2

from .methods import ALL

PREFIX_BATCH = 32
LONGEST = 256  # tokens; nothing here has more
MINILM_TARGETS = {
    ALL: r".*\.(query|key|value|dense)",
    "query and value": r".*\.(query|value)",
    "attention": r".*\.attention\..*\.(query|key|value|dense)",
    "MLP": r".*\.\d+\.(intermediate|output)\.dense",
}
SMOLLM2_TARGETS = {
    ALL: r".*\.(q|k|v|up|down)_proj",
    "query and value": r".*\.(q|v)_proj",
    "attention": r".*\.(q|k|v|o)_proj",
    "MLP": r".*\.(gate|up|down)_proj",
}


@dataclass(frozen=True)
class Batch:
    """Questions as the adapted layers take them.

    Shapes: ``hidden`` (questions, longest, width), ``mask`` (questions, longest), ``labels`` (questions,).
    """

    hidden: Tensor
    mask: Tensor
    labels: Tensor


class Upper(nn.Module):
    """The adapted layers and what reads the classes off them.

    Args:
        body: takes ``inputs_embeds`` and returns hidden states.
        head: scores the classes.
        causal: whether the last position answers, of rows padded on the left; else it is the mean of all positions.
    """

    def __init__(self, body: nn.Module, head: nn.Linear, causal: bool) -> None:
        super().__init__()
        self.body, self.head, self.causal = body, head, causal

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return logits (questions, classes)."""
        extra = {"position_ids": positions(mask), "use_cache": False} if self.causal else {}
        states = self.body(inputs_embeds=hidden, attention_mask=mask, **extra).last_hidden_state
        if self.causal:
            pooled = states[:, -1]
        else:
            pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        logits: Tensor = self.head(pooled)
        return logits


class CutModel:
    """A model whose upper layers are adapted, and what it needs to answer.

    Args:
        lower: embeddings and frozen layers; its last hidden state is the upper layers' input.
        upper: the rest.
        tokenizer: the model's.
        classes: in the order of the head's outputs.
        targets: sets of linear layers, by their names; each a pattern of the layers' names.
        new_head: whether the head is new and trained in full.
    """

    def __init__(
        self,
        lower: nn.Module,
        upper: Upper,
        tokenizer: PreTrainedTokenizerBase,
        classes: Sequence[str],
        targets: dict[str, str],
        new_head: bool,
    ) -> None:
        self.lower, self.upper = lower.eval(), upper.eval()
        self.tokenizer, self.classes = tokenizer, list(classes)
        self.targets, self.new_head = targets, new_head
        self._known: dict[str, Tensor] = {}

    def fresh(self, seed: int) -> Upper:
        """Return the upper layers, with a head drawn from the seed where it is new; weights of the body are shared."""
        torch.manual_seed(seed)
        model = copy.deepcopy(self.upper, {id(p): p for p in self.upper.body.parameters()})
        if self.new_head:
            nn.init.normal_(model.head.weight, std=0.02)
            nn.init.zeros_(model.head.bias)
        return model

    def batch(self, questions: Sequence[Question]) -> Batch:
        """Look the questions up, or compute what is new, and pad."""
        new = [q.prompt for q in questions if q.prompt not in self._known]
        for start in range(0, len(new), PREFIX_BATCH):
            self._compute(new[start : start + PREFIX_BATCH])
        rows = [self._known[question.prompt] for question in questions]
        labels = torch.tensor([self.classes.index(question.answer) for question in questions])
        return Batch(self._pad(rows), self._pad([torch.ones(len(row)) for row in rows]).long(), labels)

    def _pad(self, rows: list[Tensor]) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_side="left" if self.upper.causal else "right")

    @torch.no_grad()
    def _compute(self, prompts: list[str]) -> None:
        rows = [
            torch.tensor(ids)
            for ids in self.tokenizer(prompts, truncation=True, max_length=LONGEST).input_ids
        ]
        ids, mask = self._pad(rows), self._pad([torch.ones(len(row)) for row in rows]).long()
        extra = {"position_ids": positions(mask)} if self.upper.causal else {}
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
    """all-MiniLM-L6-v2, its upper ``layers`` of 6 adapted: a new head on the mean of the tokens, as it was trained."""
    folder = minilm.locate()
    lower, body = (
        AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False) for _ in range(2)
    )
    lower.encoder.layer = lower.encoder.layer[:-layers]
    body.encoder.layer = body.encoder.layer[-layers:]
    body.embeddings = Given()
    upper = Upper(body, nn.Linear(body.config.hidden_size, len(classes)), causal=False)
    return CutModel(
        lower, upper, AutoTokenizer.from_pretrained(folder), classes, MINILM_TARGETS, new_head=True
    )


def cut_smollm2(classes: Sequence[str], layers: int) -> CutModel:
    """SmolLM2-135M, its upper ``layers`` of 30 adapted. Of its vocabulary only the answers' first tokens are scored."""
    folder = smollm2.cached_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = Encoder(tokenizer, set(classes), LONGEST)
    lower, body = (AutoModel.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    head = nn.Linear(body.config.hidden_size, len(classes), bias=False)
    head.weight = nn.Parameter(body.embed_tokens.weight[encoder.answer_tokens].detach().clone())
    lower.layers = lower.layers[:-layers]
    lower.config.num_hidden_layers = len(lower.layers)
    lower.norm = nn.Identity()
    body.layers = body.layers[-layers:]
    body.embed_tokens = nn.Identity()
    return CutModel(
        lower, Upper(body, head, causal=True), tokenizer, encoder.answers, SMOLLM2_TARGETS, new_head=False
    )
