"""Means and intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import mpmath  # torch's own requirement

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
