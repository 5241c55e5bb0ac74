"""A share of a task's methods, run by one process; one that is spawned finds nothing that stands in `__main__`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from questions import Splits
from rich.console import Console

from . import data
from .methods import BY_NAME, LEARNING_RATES
from .study import Slice
from .tasks import TASKS, Task

SMOKE_QUESTIONS = 40

console = Console(highlight=False)


def run_share(
    name: str, records: Path, smoke: bool, rates: Sequence[float], seeds: int, methods: Sequence[str]
) -> None:
    """A task's runs of some methods, on one thread."""
    torch.set_num_threads(1)
    if smoke:
        part = smoke_slice(TASKS[name], records)
    else:
        part = Slice(TASKS[name], records, console.print, rates=rates)
    part.run(seeds, [BY_NAME[method] for method in methods])


def smoke_slice(task: Task, records: Path) -> Slice:
    """A task in seconds."""
    splits = Splits(*(part[:SMOKE_QUESTIONS] for part in data.prepare(task.read(), task.held_out)))
    short = replace(task, steps=2, batch_size=4)
    return Slice(short, records, console.print, splits, LEARNING_RATES[:1], further=False)
