"""What changed between two runs beyond noise: `make bench-compare OLD=a.json NEW=b.json`.

A figure is a ratio to its baseline in the same round, by the protocol. It changed where both hold:

- the quartile ranges of its rounds in the two runs do not overlap;
- its medians differ by more than 5 %.

The first alone is not enough, since a range tells how rounds differ within a run and not how runs differ. In eight
pairs of consecutive kept runs, LoRA, HiRA and the paper's way, whose code was the same, had their ranges apart in 92 of
1093 figures. With the second condition 11 are left (1 %). A figure that is in doubt in either run is not compared.
A size changed where it differs by more than 1 %: bytes are counted, and vary with libraries only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from . import tables
from .results import Figure, Run, read

LEAST, LEAST_SIZE = 0.05, 0.01
T = TypeVar("T")

Name = tuple[str, str, str]
"""A benchmark's title, a phase or what was counted, a provider."""


@dataclass(frozen=True)
class Difference:
    """What two runs say of the same things.

    Attributes:
        changed: ratios that changed, old and new, the largest change first.
        sizes: bytes that changed.
        same: how many ratios and sizes did not change.
        doubtful: how many ratios are in doubt in either run.
        missing: benchmarks that only one run has.
    """

    changed: Mapping[Name, tuple[Figure, Figure]]
    sizes: Mapping[Name, tuple[int, int]]
    same: int
    doubtful: int
    missing: Sequence[str]


def difference(old: Run, new: Run) -> Difference:
    """Compare every ratio and size that both runs have."""
    ratios = _pairs(_ratios(old), _ratios(new))
    judged = {name: pair for name, pair in ratios.items() if not any(figure.doubt for figure in pair)}
    changed = {name: pair for name, pair in judged.items() if _apart(*pair)}
    both = _pairs(_sizes(old), _sizes(new))
    sizes = {name: (was, now) for name, (was, now) in both.items() if abs(now - was) > LEAST_SIZE * was}
    return Difference(
        changed=dict(sorted(changed.items(), key=lambda item: -abs(_change(*item[1]) - 1))),
        sizes=sizes,
        same=len(judged) - len(changed) + len(both) - len(sizes),
        doubtful=len(ratios) - len(judged),
        missing=sorted({r.title for r in old.results} ^ {r.title for r in new.results}),
    )


def main(
    old: Annotated[Path, typer.Argument(help="JSON of the run before.")],
    new: Annotated[Path, typer.Argument(help="JSON of the run after.")],
) -> None:
    """Say what changed between two runs beyond noise."""
    print(report(read(old), read(new)))


def report(old: Run, new: Run) -> str:
    """The differences of two runs in words and tables."""
    found = difference(old, new)
    ratios = [
        (*name, str(was), str(now), f"{_change(was, now):.2f}") for name, (was, now) in found.changed.items()
    ]
    sizes = [
        (*name, tables.mib(was, 2), tables.mib(now, 2), f"{now / was:.2f}" if was else "–")
        for name, (was, now) in found.sizes.items()
    ]
    slower = sum(_change(*pair) > 1 for pair in found.changed.values())
    parts = (
        f"old: {tables.machine_line(old)}\nnew: {tables.machine_line(new)}",
        "" if old.slug == new.slug else "The machines differ, and so may what they are fast at.",
        tables.table(("ratio, median [quartiles]", "phase", "", "old", "new", "new over old"), ratios),
        tables.table(("size, MiB", "", "", "old", "new", "new over old"), sizes),
        f"Only in one of the runs: {'; '.join(found.missing)}." if found.missing else "",
        f"Changed: {slower} slower, {len(ratios) - slower} faster, {len(sizes)} sizes. The same: {found.same}. "
        f"Not compared, since they are noisy or of one round: {found.doubtful}.",
    )
    return "\n\n".join(part.strip() for part in parts if part)


def _pairs(old: Mapping[Name, T], new: Mapping[Name, T]) -> dict[Name, tuple[T, T]]:
    return {name: (was, new[name]) for name, was in old.items() if name in new}


def _ratios(run: Run) -> dict[Name, Figure]:
    """Every ratio to a baseline."""
    return {
        (result.title, phase, name): figure
        for result in run.results
        for phase, seconds in result.seconds.items()
        for name in seconds
        if name != result.baseline and (figure := result.ratio(phase, name)) is not None
    }


def _sizes(run: Run) -> dict[Name, int]:
    return {
        (result.title, kind, name): size
        for result in run.results
        for name, sizes in result.bytes.items()
        for kind, size in sizes.items()
    }


def _apart(was: Figure, now: Figure) -> bool:
    overlap = was.quartiles.low <= now.quartiles.high and now.quartiles.low <= was.quartiles.high
    return not overlap and abs(_change(was, now) - 1) > LEAST


def _change(was: Figure, now: Figure) -> float:
    return now.median / was.median


if __name__ == "__main__":
    typer.run(main)
