"""The goals for the layer on one CPU thread, and whether a run meets them. goals.csv lists them."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from .protocol import Figure
from .results import Result, Run


@dataclass(frozen=True)
class Goal:
    """A goal: a provider's time or bytes over another's is at most `limit`.

    Attributes:
        text: for a reader.
        limit: of the ratio.
        title: of the benchmark; if a pattern matches several, the worst is judged.
        what: a timed phase or a counted size.
        name, over: the providers; seconds are judged if `over` is "".
        above: a provider whose bytes are subtracted from both, or "".
    """

    text: str
    limit: float
    title: str
    what: str
    name: str
    over: str
    above: str

    def measure(self, run: Run) -> tuple[Figure, Result] | None:
        """The ratio in a run and its benchmark's result; None if it was not measured."""
        results = [result for result in run.results if fnmatchcase(result.title, self.title)]
        found = [(figure, result) for result in results if (figure := self._figure(result)) is not None]
        return max(found, key=lambda pair: pair[0].median, default=None)

    def _figure(self, result: Result) -> Figure | None:
        if self.what in result.seconds:
            found = result.comparison(self.what)
            return found.ratio(self.name, self.over) if self.over else found.time(self.name)
        sizes = {name: counted[self.what] for name, counted in result.bytes.items() if self.what in counted}
        if not {self.name, self.over} <= sizes.keys():
            return None
        base = sizes[self.above] if self.above else 0
        return Figure.of([(sizes[self.name] - base) / (sizes[self.over] - base)])

    def verdict(self, figure: Figure, result: Result) -> str:
        """Met, or missed by how much; nothing is judged on a noisy machine or by a single round."""
        if figure.doubt:
            return f"{figure.doubt}, not judged"
        if figure.median <= self.limit:
            return "met"
        missed = f"missed by {figure.median - self.limit:.2f} ({figure.median / self.limit - 1:.0%})"
        phases = [phase for phase in result.seconds if phase != self.what] if self.what == "both" else []
        parts = [(phase, result.comparison(phase).ratio(self.name, self.over)) for phase in phases]
        return (
            missed
            + ": " * bool(parts)
            + ", ".join(f"{phase} {part.median:.2f}" for phase, part in parts if part)
        )


with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as _file:
    GOALS = tuple(Goal(**row | {"limit": float(row["limit"])}) for row in csv.DictReader(_file))  # type: ignore[arg-type]
