"""Compare two runs and list changes beyond noise: `make bench-compare OLD=a.json NEW=b.json`.

A figure is a ratio to its baseline in the same round, by the protocol. It counts as changed if both hold:

- the quartile ranges of its rounds in the two runs do not overlap;
- its medians differ by more than 5 %.

The first condition alone is not enough: a range shows how rounds differ within a run, not how runs differ. In eight
pairs of consecutive kept runs, the code of LoRA, HiRA and the paper's way was the same, and yet the ranges of 92 of
1093 figures did not overlap. With the second condition 11 remain (1 %). A figure that is in doubt in either run is not
compared. A size counts as changed if it differs by more than 1 %: bytes are counted, and vary with libraries only.
A goal counts as changed if one run meets it and the other misses it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from . import tables
from .goals import GOALS
from .protocol import Figure
from .results import Run, read

LEAST, LEAST_SIZE = 0.05, 0.01

Name = tuple[str, str, str]
"""A benchmark's title, a phase or what was counted, a provider."""
Change = tuple[Name, Figure, Figure]
"""What changed, from which figure to which."""


def changes(
    old: Mapping[Name, Figure], new: Mapping[Name, Figure], least: float
) -> tuple[list[Change], int, int]:
    """The figures of both runs that changed, the largest change first; how many did not, and how many are in doubt."""
    both = [(name, was, new[name]) for name, was in old.items() if name in new]
    judged = [(name, was, now) for name, was, now in both if not (was.doubt or now.doubt)]
    changed = [
        (name, was, now)
        for name, was, now in judged
        if not (was.low <= now.high and now.low <= was.high)
        and abs(now.median - was.median) > least * was.median
    ]
    changed.sort(key=lambda one: -abs(_factor(one) - 1))
    return changed, len(judged) - len(changed), len(both) - len(judged)


def ratios(run: Run) -> dict[Name, Figure]:
    """Every ratio to a baseline."""
    return {
        (result.title, phase, name): figure
        for result in run.results
        for phase, seconds in result.seconds.items()
        for name in seconds
        if name != result.baseline and (figure := result.comparison(phase).ratio(name)) is not None
    }


def sizes(run: Run) -> dict[Name, Figure]:
    """Everything that was counted, in MiB."""
    return {
        (result.title, kind, name): Figure.of([size / tables.MIB])
        for result in run.results
        for name, counted in result.bytes.items()
        for kind, size in counted.items()
    }


def goals(old: Run, new: Run) -> list[tuple[str, ...]]:
    """A row for each goal that one run meets and the other misses; a figure in doubt is not judged."""
    rows: list[tuple[str, ...]] = []
    for goal in GOALS:
        was, now = goal.measure(old), goal.measure(new)
        if was and now and not was[0].doubt and not now[0].doubt:
            verdicts = ["met" if figure.median <= goal.limit else "missed" for figure, _ in (was, now)]
            if verdicts[0] != verdicts[1]:
                rows.append((goal.text, f"≤ {goal.limit:.2f}", str(was[0]), str(now[0]), verdicts[1]))
    return rows


def main(
    old: Annotated[Path, typer.Argument(help="JSON of the run before.")],
    new: Annotated[Path, typer.Argument(help="JSON of the run after.")],
) -> None:
    """Say what changed between two runs beyond noise."""
    print(report(read(old), read(new)), end="")


def report(old: Run, new: Run) -> str:
    """The differences of two runs in words and tables."""
    timed, same, doubtful = changes(ratios(old), ratios(new), LEAST)
    counted, same_sizes, _ = changes(sizes(old), sizes(new), LEAST_SIZE)
    slower = sum(_factor(one) > 1 for one in timed)
    missing = sorted({r.title for r in old.results} ^ {r.title for r in new.results})
    columns = ("old", "new", "new over old")
    times = [(*name, str(was), str(now), f"{_factor((name, was, now)):.2f}") for name, was, now in timed]
    bytes = [
        (*name, was.short(), now.short(), f"{_factor((name, was, now)):.2f}") for name, was, now in counted
    ]
    return tables.paragraphs(
        f"old: {tables.machine_line(old)}\nnew: {tables.machine_line(new)}",
        "" if old.slug == new.slug else "The machines differ, and so may what they are fast at.",
        tables.table(("ratio, median [quartiles]", "phase", "", *columns), times),
        tables.table(("size, MiB", "", "", *columns), bytes),
        tables.table(("ratio", "goal", "old", "new", ""), goals(old, new)),
        f"Only in one of the runs: {'; '.join(missing)}." if missing else "",
        f"Changed: {slower} slower, {len(times) - slower} faster, {len(bytes)} sizes. The same: "
        f"{same + same_sizes}. Not compared, since they are noisy or of one round: {doubtful}.",
    )


def _factor(one: Change) -> float:
    return one[2].median / one[1].median if one[1].median else math.inf


if __name__ == "__main__":
    typer.run(main)
