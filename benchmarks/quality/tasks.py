"""The tasks: questions, model, and length of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import minilm
import smollm2
from questions import Question

from . import data
from .experts import cut_experts
from .models import CutModel, cut_minilm, cut_smollm2, cut_smollm2_choices


@dataclass(frozen=True)
class Task:
    """One slice of the study.

    Attributes:
        name: on the command line and in records.
        title: for a person.
        read: its questions.
        cut: cuts the model for given classes, a number of layers from the top.
        layers, of_layers: the adapted layers, and all layers.
        model: its name.
        steps, batch_size: of every run.
        head_lr: of a new head, the same for all methods; 0 if there is none.
        held_out: one question in so many is for validation, and as many are for the test.
        control: has no part in averages over tasks, for it tests a condition of another task, or a random model.
    """

    name: str
    title: str
    read: Callable[[], list[Question]]
    cut: Callable[[Sequence[str], int], CutModel]
    model: str
    of_layers: int
    layers: int
    steps: int = 60
    batch_size: int = 16
    head_lr: float = 0.0
    held_out: int = 10
    control: bool = False


MINILM, SMOLLM2 = minilm.NAME, smollm2.NAME


def _minilm(name: str, title: str, read: Callable[[], list[Question]]) -> Task:
    return Task(name, title, read, cut_minilm, MINILM, of_layers=6, layers=2, head_lr=1e-2)


_TREC = Task("trec6", "TREC-6", data.trec6, cut_smollm2, SMOLLM2, of_layers=30, layers=3)
_LONG: dict[str, Any] = {
    "name": "trec6-long",
    "title": "TREC-6, three times as long",
    "steps": 180,
    "control": True,
}
EXPERTS = Task(
    "experts", "TREC-6, experts", data.trec6, cut_experts, "a tiny Qwen3-MoE", of_layers=2, layers=2,
    steps=200, batch_size=32, head_lr=1e-2, control=True,
)  # fmt: skip
_CHOICES: dict[str, Any] = {"cut": cut_smollm2_choices, "batch_size": 8, "held_out": 4}
TASKS = {
    task.name: task
    for task in (
        _minilm("trec50", "TREC-50", data.trec_fine),
        _minilm("films", "film reviews", data.films),
        _minilm("opinions", "opinions", data.opinions),
        _TREC,
        replace(_TREC, **_LONG),
        EXPERTS,
        replace(_TREC, name="csqa", title="CommonsenseQA", read=data.commonsense, **_CHOICES),
        replace(_TREC, name="siqa", title="Social IQa", read=data.social, layers=2, batch_size=8),
    )
}
