"""How `smoa-kernels tune` and `info` show problems, choices and what was measured. Imports Triton."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

from rich.table import Table

from ..kernels.heuristic import CONFIGS, Key
from ..triton_backend import admissible
from ..tuning.entries import Choice, Entry, Trial
from ..tuning.tuner import Job

__all__ = ["best_words", "failures", "plan_table", "problem_words", "result_table", "winner"]


def problem_words(key: Key) -> str:
    """A key for a person."""
    sizes = f"{key.out_features}x{key.in_features}" if key.out_features else f"{key.in_features} columns"
    tokens = f" T≤{key.tokens}" if key.tokens else ""
    rank = f" ρ={key.rank}" if key.rank else ""
    turned = " transposed" if key.transposed else ""
    return f"{key.kernel} {sizes}{tokens}{rank} K={key.blocks} {key.dtype}{turned}"


def choice_words(choice: Choice) -> str:
    """Launch parameters, or the name of an algorithm."""
    if isinstance(choice, str):
        return choice
    fields = asdict(choice).items()
    return " ".join(f"{name.removeprefix('block_').removeprefix('num_')}={value}" for name, value in fields)


def winner(entry: Entry) -> Trial | None:
    """The fastest trial that may be chosen: no algorithm that breaks the numbers, however fast."""
    kernel, dtype = entry.key.kernel, entry.key.dtype
    return entry.best(None if kernel in CONFIGS else admissible(kernel, dtype))


def best_words(entry: Entry) -> str:
    """The best of an entry in one line."""
    best = winner(entry)
    if best is None or best.seconds is None:
        return f"{problem_words(entry.key)}: nothing yet"
    return f"{problem_words(entry.key)}: {best.seconds * 1e6:.1f} µs, {choice_words(best.choice)}"


def plan_table(job: Job) -> Table:
    """What would be timed for a problem, what not, and why."""
    table = Table(title=problem_words(job.key), title_justify="left", show_header=False)
    for choice in job.candidates:
        table.add_row(
            choice_words(choice), "timed" + (", runs without a table" if choice == job.default else "")
        )
    for choice, reason in job.pruned:
        table.add_row(choice_words(choice), f"pruned: {reason}", style="dim")
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
        if entry is None or not entry.trials:
            continue
        best, default = winner(entry), entry.trial(job.default)
        before = None if default is None else default.seconds
        after = None if best is None else best.seconds
        table.add_row(
            problem_words(job.key),
            "-" if best is None else choice_words(best.choice),
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
            if trial.seconds is None and trial.settled:
                yield f"failed: {problem_words(job.key)} at {choice_words(trial.choice)}: {trial.reason}"
