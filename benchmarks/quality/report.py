"""Tables and figures from the records: ``benchmarks/results/quality.md`` and its SVGs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..results import write
from . import plots
from .methods import ABLATIONS, LEARNING_RATES, METHODS, RANK
from .statistics import Mean, paired, summarize
from .study import best_rate
from .tasks import TASKS

Records = Sequence[dict[str, Any]]
BASELINE = "LoRA"
HALF = "SMoA K=2"  # about half of LoRA's parameters
EQUAL = ("SMoA K=2, r=16", "SMoA K=4, r=32")  # about LoRA's parameters


class Study:
    """The records, by task, method and seed.

    Args:
        records: as they were read; a run that is there twice counts once.
    """

    def __init__(self, records: Records) -> None:
        self.records = records
        self.tasks = [name for name in TASKS if any(r["task"] == name for r in records)]
        self.methods = [m.name for m in METHODS if any(r["method"] == m.name for r in records)]

    def select(self, **fields: Any) -> list[dict[str, Any]]:
        """The records whose fields have the given values."""
        return [r for r in self.records if all(r[name] == value for name, value in fields.items())]

    def accuracies(self, task: str, method: str) -> dict[int, float]:
        """Test accuracy by seed, at the learning rate that validation chose."""
        rate = best_rate(self.records, task, method)
        runs = self.select(task=task, method=method, stage="final")
        return {r["seed"]: r["accuracy"] for r in runs if rate is None or r["lr"] == rate}

    def mean(self, task: str, method: str) -> Mean | None:
        """Mean test accuracy over the seeds."""
        found = self.accuracies(task, method)
        return summarize(list(found.values())) if found else None

    def difference(self, task: str, ours: str, theirs: str) -> Mean | None:
        """Mean difference in test accuracy, seed by seed."""
        return paired(self.accuracies(task, ours), self.accuracies(task, theirs))

    def overall(self, ours: str, theirs: str) -> Mean | None:
        """Mean over the tasks of the tasks' mean differences; the interval is over all pairs of task and seed.

        A task's own mean is subtracted before its spread is counted, so that the interval speaks of these tasks.
        """
        pairs = []
        for task in self.tasks:
            a, b = self.accuracies(task, ours), self.accuracies(task, theirs)
            pairs.append([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])
        pairs = [p for p in pairs if p]
        if not pairs:
            return None
        return over_tasks(pairs)


def over_tasks(differences: Sequence[Sequence[float]]) -> Mean:
    """Mean of the tasks' means, with the t interval of seeds within tasks (variances pooled)."""
    from .statistics import CONFIDENCE, t_quantile

    means = [sum(d) / len(d) for d in differences]
    value = sum(means) / len(means)
    freedom = sum(len(d) - 1 for d in differences)
    count = sum(map(len, differences))
    if not freedom:
        return Mean(value, math.nan, math.nan, count)
    squares = sum((x - m) ** 2 for d, m in zip(differences, means, strict=True) for x in d)
    error = math.sqrt(squares / freedom * sum(1 / len(d) for d in differences)) / len(differences)
    return Mean(value, error, t_quantile((1 + CONFIDENCE) / 2, freedom) * error, count)
