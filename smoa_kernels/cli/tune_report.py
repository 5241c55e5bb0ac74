"""What `smoa-kernels tune` prints of what would be timed, and of what was measured. Imports Triton."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.table import Table

from ..backends.triton import admissible
from ..kernels.heuristic import Key
from ..kernels.table import INTERRUPTED, Entry, describe
from ..tuning.format import describe_choice, winner
from ..tuning.tuner import Job

__all__ = ["best_words", "failures", "plan_table", "result_table"]


def best_words(entry: Entry) -> str:
    """The best of an entry in one line."""
    best = winner(entry)
    if best is None or best.seconds is None:
        return f"{describe(entry.key)}: nothing yet"
    return f"{describe(entry.key)}: {best.seconds * 1e6:.1f} µs, {describe_choice(best.choice)}"


def plan_table(job: Job) -> Table:
    """What would be timed for a problem, what not, and why."""
    table = Table(title=describe(job.key), title_justify="left", show_header=False)
    for choice in job.candidates:
        told = "timed" + (", runs without a table" if choice == job.default else "")
        if isinstance(choice, str) and choice not in admissible(job.key.kernel, job.key.dtype):
            told = "timed to compare, never chosen: a rounded W_eff loses a small update"
        table.add_row(describe_choice(choice), told)
    for choice, reason in job.pruned:
        table.add_row(describe_choice(choice), f"pruned: {reason}", style="dim")
    return table


def result_table(jobs: Sequence[Job], found: Mapping[Key, Entry]) -> Table:
    """Heuristic against tuned time of every problem that has an entry."""
    table = Table(title="Heuristic against tuned, medians")
    for heading in ("problem", "choice", "tried"):
        table.add_column(heading)
    for heading in ("heuristic µs", "tuned µs", "ratio"):
        table.add_column(heading, justify="right")
    for job in jobs:
        entry = found.get(job.key)
        if entry is None:
            continue
        best, default = winner(entry), entry.trial(job.default)
        before = None if default is None else default.seconds
        after = None if best is None else best.seconds
        table.add_row(
            describe(job.key),
            "-" if best is None else describe_choice(best.choice),
            f"{len(entry.trials)} of {len(job.candidates)}",
            "-" if before is None else f"{before * 1e6:.1f}",
            "-" if after is None else f"{after * 1e6:.1f}",
            "-" if before is None or after is None else f"{after / before:.2f}",
        )
    return table


def failures(jobs: Sequence[Job], found: Mapping[Key, Entry]) -> Iterator[str]:
    """A line for every candidate that was tried and not timed."""
    for job in jobs:
        for trial in found[job.key].trials if job.key in found else ():
            if trial.seconds is None and trial.reason != INTERRUPTED:
                yield f"failed: {describe(job.key)} at {describe_choice(trial.choice)}: {trial.reason}"
