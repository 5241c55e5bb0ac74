"""What the records say: accuracy by method and task, differences seed by seed, what validation chose."""

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
    """A mean with its standard error, and half of the width of its confidence interval (NaN for one value)."""

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


def summarize(values: Sequence[float]) -> Mean:
    """Return the mean of at least one value, with Student's t interval."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return Mean(mean, math.nan, math.nan, count)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    error = math.sqrt(variance / count)
    return Mean(mean, error, t_quantile((1 + CONFIDENCE) / 2, count - 1) * error, count)


def paired(ours: dict[int, float], theirs: dict[int, float]) -> Mean | None:
    """Return the mean difference over the seeds that both have; None where there is no such seed."""
    common = sorted(ours.keys() & theirs.keys())
    return summarize([ours[seed] - theirs[seed] for seed in common]) if common else None


def over_groups(differences: Sequence[Sequence[float]]) -> Mean:
    """Return the mean of the groups' means; its interval counts the spread within groups alone, pooled.

    So it speaks of these groups (tasks), not of others that might have been drawn.
    """
    means = [sum(group) / len(group) for group in differences]
    value, count = sum(means) / len(means), sum(map(len, differences))
    freedom = count - len(differences)
    if not freedom:
        return Mean(value, math.nan, math.nan, count)
    squares = sum((x - mean) ** 2 for group, mean in zip(differences, means, strict=True) for x in group)
    error = math.sqrt(squares / freedom * sum(1 / len(group) for group in differences)) / len(differences)
    return Mean(value, error, t_quantile((1 + CONFIDENCE) / 2, freedom) * error, count)


def t_quantile(probability: float, freedom: int) -> float:
    """Return Student's t quantile, for a probability above one half."""

    def above(t: mpmath.mpf) -> mpmath.mpf:
        x = freedom / (freedom + t**2)
        return mpmath.betainc(freedom / 2, 0.5, 0, x, regularized=True) / 2 - (1 - probability)

    return float(mpmath.findroot(above, (1e-3, 1e3), solver="bisect", maxsteps=200))


class Study:
    """The records, as questions are asked of them.

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

    def select(self, **fields: Any) -> list[dict[str, Any]]:
        """The records whose fields have the given values."""
        return [r for r in self.records if all(r[name] == value for name, value in fields.items())]

    def finals(self, task: str, method: str) -> list[dict[str, Any]]:
        """Runs on test at the learning rate that validation chose."""
        rate = best_rate(self.records, task, method)
        runs = self.select(task=task, method=method, stage="final")
        return [run for run in runs if rate is None or run["lr"] == rate]

    def accuracies(self, task: str, method: str) -> dict[int, float]:
        """Test accuracy by seed."""
        return {run["seed"]: run["accuracy"] for run in self.finals(task, method)}

    def mean(self, task: str, method: str) -> Mean | None:
        """Mean test accuracy over the seeds."""
        found = self.accuracies(task, method)
        return summarize(list(found.values())) if found else None

    def difference(self, task: str, ours: str, theirs: str) -> Mean | None:
        """Mean difference in test accuracy, seed by seed."""
        return paired(self.accuracies(task, ours), self.accuracies(task, theirs))

    def learned(self, task: str) -> bool:
        """Whether some adapter is significantly better than no adapter there."""
        gains = [self.difference(task, name, "none") for name in self.methods if name != "none"]
        return any(gain is not None and gain.low > 0 for gain in gains)

    def overall(self, ours: str, theirs: str, tasks: Sequence[Task] | None = None) -> Mean | None:
        """Mean over the tasks (all but controls) of their mean differences; None unless both were run on each."""
        groups = self._differences(ours, theirs, self.tasks if tasks is None else tasks)
        return over_groups(groups) if groups and all(groups) else None

    def over_tasks_run(self, ours: str, theirs: str) -> tuple[Mean, int] | None:
        """The same over those tasks alone on which both were run, and how many they are; None for fewer than two."""
        groups = [group for group in self._differences(ours, theirs, self.tasks) if group]
        return (over_groups(groups), len(groups)) if len(groups) > 1 else None

    def _differences(self, ours: str, theirs: str, tasks: Sequence[Task]) -> list[list[float]]:
        found = []
        for task in tasks:
            a, b = self.accuracies(task.name, ours), self.accuracies(task.name, theirs)
            found.append([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])
        return found

    def tried(self, task: str, method: str) -> dict[float, float]:
        """Validation accuracy by learning rate."""
        return {run["lr"]: run["accuracy"] for run in searched(self.records, task, method)}

    def shared_rates(self, task: str) -> list[float]:
        """The rates that every method tried which has runs on test."""
        tried = [set(self.tried(task, name)) for name in self.methods if self.finals(task, name)]
        return sorted(set.intersection(*filter(None, tried))) if any(tried) else []

    def at_an_edge(self, task: str, method: str) -> bool:
        """Whether the best learning rate is the least or the greatest that was tried."""
        rates = list(self.tried(task, method))
        return best_rate(self.records, task, method) in (rates[:1] + rates[-1:])

    def plateau(self, task: str, method: str, points: float = 0.02) -> tuple[float, float]:
        """The rates around the best one, next to each other in the grid, that lose at most so much on validation."""
        tried = self.tried(task, method)
        best = best_rate(self.records, task, method)
        if best is None:
            return math.nan, math.nan
        rates = list(tried)
        low = high = rates.index(best)
        while low and tried[rates[low - 1]] >= tried[best] - points:
            low -= 1
        while high + 1 < len(rates) and tried[rates[high + 1]] >= tried[best] - points:
            high += 1
        return rates[low], rates[high]

    def minutes(self, task: str) -> float:
        """Of CPU, for all runs of the methods on one thread."""
        spent: list[float] = [r["seconds"] for r in self.select(task=task) if r["method"] in self.methods]
        return sum(spent) / 60

    def average(self, method: str, field: str, task: str) -> float:
        """Mean of a field of the runs on test; NaN where there is none, or where records did not say it yet."""
        values = [run.get(field, math.nan) for run in self.finals(task, method)]
        return sum(values) / len(values) if values else math.nan
