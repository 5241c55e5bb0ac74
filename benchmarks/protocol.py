"""How anything is timed here, in code: the one protocol that every benchmark uses.

Threads are pinned and every variant is warmed up; then the variants take turns, round by round, so that a
machine whose speed drifts drifts under all of them. A figure is the median over rounds of the ratio to the
baseline *of the same round*, with its interquartile range. A run whose baseline spreads by more than 15 % is
marked "noisy": its ratios are printed, and are not to be quoted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

MAX_SPREAD = 0.15


@dataclass(frozen=True)
class Timing:
    """One variant's figures: median seconds and its ratio to the baseline, with the ratio's quartiles."""

    seconds: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Variants timed in turns against a baseline."""

    baseline: str
    timings: dict[str, Timing]
    spread: float  # interquartile range of the baseline over its median

    @property
    def noisy(self) -> bool:
        """Whether the machine was too unsteady for the ratios to be quoted."""
        return self.spread > MAX_SPREAD


def compare(
    variants: Mapping[str, Callable[[], float]], *, baseline: str, rounds: int, warmup: int = 2
) -> Comparison:
    """Time variants in turns. A variant runs once per call and returns its seconds (see :func:`timed`)."""
    for _ in range(warmup):
        for run in variants.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            seconds[name].append(run())
    timings = {}
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds[baseline], strict=True)]
        low, _, high = quartiles(ratios)
        timings[name] = Timing(statistics.median(values), statistics.median(ratios), low, high)
    low, middle, high = quartiles(seconds[baseline])
    return Comparison(baseline, timings, (high - low) / middle)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call, the device's work included."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
