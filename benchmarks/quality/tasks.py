"""The tasks: which questions, which model, how long a run is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import minilm
import smollm2
from questions import Question

from . import data
from .models import CutModel, cut_minilm, cut_smollm2, cut_smollm2_choices


@dataclass(frozen=True)
class Task:
    """One slice of the study.

    Attributes:
        name: on the command line and in records.
        title: for a person.
        read: its questions.
        cut: cuts the model for these classes, so many layers from the top.
        layers, of_layers: how many are adapted, of how many.
        model: its name.
        steps, batch_size: of every run.
        head_lr: of the head that is new in every run, the same for all methods; 0 where there is none.
        held_out: one question in so many is for validation, and as many for the test.
        control: tests a condition of another task, so it has no part in averages over tasks.
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
TASKS = {
    task.name: task
    for task in (
        Task("trec50", "TREC-50", data.trec_fine, cut_minilm, MINILM, 6, layers=2, head_lr=1e-2),
        Task("films", "film reviews", data.films, cut_minilm, MINILM, 6, layers=2, head_lr=1e-2),
        Task("opinions", "opinions", data.opinions, cut_minilm, MINILM, 6, layers=2, head_lr=1e-2),
        Task("trec6", "TREC-6", data.trec6, cut_smollm2, SMOLLM2, 30, layers=3),
        Task(
            "trec6-long",
            "TREC-6, three times as long",
            data.trec6,
            cut_smollm2,
            SMOLLM2,
            30,
            layers=3,
            steps=180,
            control=True,
        ),
        Task(
            "csqa",
            "CommonsenseQA",
            data.commonsense,
            cut_smollm2_choices,
            SMOLLM2,
            30,
            layers=3,
            batch_size=8,
            held_out=4,
        ),
        Task("siqa", "Social IQa", data.social, cut_smollm2, SMOLLM2, 30, layers=2, batch_size=8),
    )
}
