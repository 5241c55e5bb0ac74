"""A task's methods in shares, each run by one process. A spawned process cannot import from `__main__`.

However the command ends, by Ctrl-C, SIGTERM or SIGKILL, its processes end with it, at once: a run that is under way is
lost, and those that are done are in the records.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import torch
from questions import Splits
from rich.console import Console

from . import data
from .methods import BY_NAME, LEARNING_RATES
from .study import Slice
from .tasks import TASKS, Task

SMOKE_QUESTIONS = 40

console = Console(highlight=False)


class Share(NamedTuple):
    """Some methods' runs of a task, as `python -m benchmarks.quality run` is asked for them."""

    task: str
    records: Path
    smoke: bool
    rates: Sequence[float]
    seeds: int
    methods: Sequence[str]


def run_shares(shares: Sequence[Share]) -> None:
    """Run them side by side, in a process each; a single one in this process."""
    if len(shares) == 1:
        run_share(shares[0])
        return
    with ProcessPoolExecutor(len(shares), get_context("spawn"), initializer=end_with_parent) as pool:
        try:
            list(pool.map(run_share, shares))
        except KeyboardInterrupt:  # which the pool would have wait until every share is done
            for process in active_children():
                process.terminate()
            raise


def end_with_parent() -> None:
    """Have this process, which another has spawned, end when that one does, whatever it ends by."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to both; it is the parent's
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def run_share(share: Share) -> None:
    """Do its runs, on one thread."""
    torch.set_num_threads(1)
    if share.smoke:
        part = smoke_slice(TASKS[share.task], share.records)
    else:
        part = Slice(TASKS[share.task], share.records, console.print, rates=share.rates)
    part.run(share.seeds, [BY_NAME[method] for method in share.methods])


def smoke_slice(task: Task, records: Path) -> Slice:
    """A task in seconds."""
    splits = Splits(*(part[:SMOKE_QUESTIONS] for part in data.prepare(task.read(), task.held_out)))
    short = replace(task, steps=2, batch_size=4)
    return Slice(short, records, console.print, splits, LEARNING_RATES[:1], further=False)
