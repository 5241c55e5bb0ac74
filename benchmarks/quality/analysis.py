"""Evaluates the records: accuracy by method and task, differences seed by seed, the rates that validation chose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import mpmath  # torch's own requirement

from .methods import METHODS
from .study import best_rate, searched
from .tasks import TASKS, Task

CONFIDENCE = 0.95


class Mean(NamedTuple):
    """A mean with its standard error and half of the width of its confidence interval (both NaN for one value)."""

    value: float
    standard_error: float
    half_width: float
    seeds: int

    @property
    def low(self) -> float:
        """The interval's lower end."""
        return self.value - self.half_width

    @property
    def high(self) -> float:
        """The interval's upper end."""
        return self.value + self.half_width


def mean_of(*groups: Sequence[float]) -> Mean:
    """Return the mean of the groups' means, with Student's t interval.

    The interval counts only the pooled spread within groups: it holds for these groups (tasks), not for others that
    might have been drawn.
    """
    means = [sum(group) / len(group) for group in groups]
    value, count = sum(means) / len(means), sum(map(len, groups))
    freedom = count - len(groups)
    if not freedom:
        return Mean(value, math.nan, math.nan, count)
    squares = sum((x - mean) ** 2 for group, mean in zip(groups, means, strict=True) for x in group)
    error = math.sqrt(squares / freedom * sum(1 / len(group) for group in groups)) / len(groups)
    return Mean(value, error, t_quantile((1 + CONFIDENCE) / 2, freedom) * error, count)


def differences(ours: dict[int, float], other: dict[int, float]) -> list[float]:
    """Return one difference for each seed that both have."""
    return [ours[seed] - other[seed] for seed in sorted(ours.keys() & other.keys())]


def t_quantile(probability: float, freedom: int) -> float:
    """Return Student's t quantile, for a probability above one half."""

    def above(t: mpmath.mpf) -> mpmath.mpf:
        x = freedom / (freedom + t**2)
        return mpmath.betainc(freedom / 2, 0.5, 0, x, regularized=True) / 2 - (1 - probability)

    return float(mpmath.findroot(above, (1e-3, 1e3), solver="bisect", maxsteps=200))


class Study:
    """Statistics of the records.

    Args:
        records: as they were read from the file.
    """

    def __init__(self, records: Sequence[dict[str, Any]]) -> None:
        self.records = records
        found = {record["task"] for record in records}
        tasks = [task for task in TASKS.values() if task.name in found]
        self.tasks: list[Task] = [task for task in tasks if not task.control]
        self.controls: list[Task] = [task for task in tasks if task.control]
        self.methods = [m.name for m in METHODS if any(r["method"] == m.name for r in records)]

    def finals(self, task: str, method: str) -> list[dict[str, Any]]:
        """Runs on test at the learning rate that validation chose."""
        rate = best_rate(self.records, task, method)
        runs = [r for r in self.records if (r["task"], r["method"], r["stage"]) == (task, method, "final")]
        return [run for run in runs if rate is None or run["lr"] == rate]

    def accuracies(self, task: str, method: str, field: str = "accuracy") -> dict[int, float]:
        """Test accuracy by seed, or another field."""
        return {run["seed"]: run[field] for run in self.finals(task, method)}

    def mean(self, task: str, method: str, field: str = "accuracy") -> Mean | None:
        """Mean test accuracy over the seeds, or of another field."""
        found = self.accuracies(task, method, field)
        return mean_of(list(found.values())) if found else None

    def difference(
        self, ours: str, other: str, tasks: Sequence[Task], fields: Sequence[str] = ("accuracy", "accuracy")
    ) -> Mean | None:
        """Mean over tasks of their mean differences, seed by seed; None unless both were run on each of the tasks."""
        groups = [
            differences(
                *(self.accuracies(task.name, *each) for each in zip((ours, other), fields, strict=True))
            )
            for task in tasks
        ]
        return mean_of(*groups) if groups and all(groups) else None

    def tried(self, task: str, method: str) -> dict[float, float]:
        """Validation accuracy by learning rate."""
        return {run["lr"]: run["accuracy"] for run in searched(self.records, task, method)}

    def plateau(self, task: str, method: str, points: float = 0.02) -> tuple[float, float]:
        """The range of adjacent rates around the best one that lose at most `points` on validation."""
        tried, best = self.tried(task, method), best_rate(self.records, task, method)
        if best is None:
            return math.nan, math.nan
        rates = list(tried)
        low = high = rates.index(best)
        while low and tried[rates[low - 1]] >= tried[best] - points:
            low -= 1
        while high + 1 < len(rates) and tried[rates[high + 1]] >= tried[best] - points:
            high += 1
        return rates[low], rates[high]

    def average(self, task: str, method: str, field: str) -> float:
        """Mean of a field of the runs on test; NaN if there is none, or if the records lack the field."""
        values = [run.get(field, math.nan) for run in self.finals(task, method)]
        return sum(values) / len(values) if values else math.nan
