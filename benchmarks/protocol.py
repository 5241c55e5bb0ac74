"""The protocol by which every benchmark here is timed.

Threads are pinned. Every provider has passed its correctness gate and is warmed up. Then the providers take turns,
round by round, each round in another order (drawn from a fixed seed). So if the machine's speed drifts, it drifts for
all of them, and no provider always runs after the same other one. A ratio divides the seconds of two providers *in the
same round*. A figure is the median of these ratios, with its quartiles.

A short call's time depends on the call before it. So a provider that takes less than 10 ms has several turns in a
round, between those of the others, at most ten and at most 20 ms in all; its seconds are their mean.

If the interquartile range of the baseline is above 15 % of its median, the machine was too unsteady: the ratios are
printed and marked noisy, but neither quoted nor judged. The same holds for a benchmark that ran in one round only.

Forward and backward are two laps of one training pass: the clock of the backward starts when the forward has ended and
built its graph. On a GPU the laps are CUDA events, and the L2 cache is overwritten before each pass, as the operands of
other layers would do. On a CPU every provider has its own weight, which does the same for large layers.
"""

from __future__ import annotations

import functools
import itertools
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MAX_SPREAD = 0.15
SHORT, MOST_TURNS = 0.02, 10
"""Seconds that a provider's turns in a round take at most, unless one takes longer; and how many there are at most."""
NOISY, ONE_ROUND = "noisy", "one round"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Run = Callable[[], Mapping[str, float]]
"""Runs a provider once and returns its seconds by phase."""


@dataclass(frozen=True)
class Figure:
    """A measurement as it is published: a median with its quartiles.

    Attributes:
        low, median, high: of the rounds.
        doubt: why it is neither quoted nor judged; "" if it is.
    """

    low: float
    median: float
    high: float
    doubt: str = ""

    @classmethod
    def of(cls, values: Sequence[float], doubt: str = "") -> Figure:
        """The quartiles of at least one value; those of a single one are that value."""
        several = len(values) > 1
        found = statistics.quantiles(values, n=4, method="inclusive") if several else [values[0]] * 3
        return cls(found[0], found[1], found[2], doubt)

    def short(self) -> str:
        """The median and the doubt."""
        return self._marked(f"{self.median:.2f}")

    def __str__(self) -> str:
        if self.doubt == ONE_ROUND:
            return self.short()
        return self._marked(f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]")

    def _marked(self, text: str) -> str:
        return f"{text}, {self.doubt}, not judged" if self.doubt else text


@dataclass(frozen=True)
class Comparison:
    """Seconds of one phase by provider and round; rounds with the same index ran together."""

    baseline: str
    seconds: Mapping[str, Sequence[float]]

    def time(self, name: str) -> Figure | None:
        """Seconds of a provider; None where it did not run."""
        return Figure.of(self.seconds[name], self.doubt) if name in self.seconds else None

    def ratio(self, name: str, over: str | None = None) -> Figure | None:
        """One provider over another (the baseline unless given), pair by pair; None without both."""
        over = over or self.baseline
        if not {name, over} <= self.seconds.keys():
            return None
        pairs = zip(self.seconds[name], self.seconds[over], strict=True)
        return Figure.of([ours / base for ours, base in pairs], self.doubt)

    @property
    def spread(self) -> float:
        """Interquartile range of the baseline over its median."""
        q = Figure.of(self.seconds[self.baseline])
        return (q.high - q.low) / q.median

    @property
    def doubt(self) -> str:
        """Why the ratios are neither quoted nor judged: the machine was too unsteady. "" if they are."""
        if len(self.seconds[self.baseline]) < 2:
            return ONE_ROUND
        return NOISY if self.spread > MAX_SPREAD else ""


class Turns:
    """Runs providers in turns and keeps the seconds of every phase and round.

    Args:
        variants: the run of each provider.
        baseline: the provider whose spread shows whether the machine is steady.
    """

    def __init__(self, variants: Mapping[str, Run], baseline: str) -> None:
        if baseline not in variants:
            raise ValueError(f"baseline must be one of {', '.join(variants)}, got {baseline!r}")
        self._variants, self._baseline = dict(variants), baseline
        self._turns = dict.fromkeys(variants, 1)
        self._rounds: list[dict[str, Mapping[str, float]]] = []

    def warm_up(self, rounds: int) -> float:
        """Run rounds that do not count; the last one decides how many turns each provider has in a round.

        Returns:
            Seconds that a round then takes; 0 without warm-up, where each provider has one turn.
        """
        elapsed = dict.fromkeys(self._variants, 0.0)
        for _ in range(rounds):
            for name, run in self._variants.items():
                start = time.perf_counter()
                run()
                elapsed[name] = time.perf_counter() - start
                self._turns[name] = max(1, min(MOST_TURNS, int(SHORT / elapsed[name])))
        return sum(self._turns[name] * elapsed[name] for name in self._variants)

    def round(self) -> None:
        """Run every provider in each of its turns."""
        turns = [name for name, count in self._turns.items() for _ in range(count)]
        found: dict[str, list[Mapping[str, float]]] = {name: [] for name in self._variants}
        for name in random.Random(len(self._rounds)).sample(turns, len(turns)):
            found[name].append(self._variants[name]())
        self._rounds.append(
            {
                name: {phase: statistics.fmean(run[phase] for run in runs) for phase in runs[0]}
                for name, runs in found.items()
            }
        )

    def comparisons(self) -> dict[str, Comparison]:
        """The measurements so far, by phase."""
        phases = self._rounds[0][self._baseline]
        return {
            phase: Comparison(
                self._baseline, {name: [r[name][phase] for r in self._rounds] for name in self._variants}
            )
            for phase in phases
        }


def laps(*steps: Callable[[], object]) -> list[float]:
    """Seconds of each step, run one after another; the device's work counts for the step that queued it."""
    if DEVICE.type == "cuda":
        return _gpu_laps(steps)
    marks = [time.perf_counter()]
    for step in steps:
        step()
        marks.append(time.perf_counter())
    return [end - start for start, end in itertools.pairwise(marks)]


def halves(
    layer: nn.Module, inputs: Sequence[Tensor], dy: Tensor
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward and backward of a layer; gradients are those of the first input and the trained parameters."""
    wanted = [inputs[0], *(p for p in layer.parameters() if p.requires_grad)]
    kept: dict[str, Any] = {}

    def forward() -> None:
        kept["y"] = layer(*inputs)

    def backward() -> None:
        kept["gradients"] = torch.autograd.grad(kept.pop("y"), wanted, dy)

    return forward, backward


def pass_seconds(layer: nn.Module, inputs: Sequence[Tensor], dy: Tensor) -> dict[str, float]:
    """Seconds of a forward that records for backward, of the backward alone, and of both."""
    forward, backward = laps(*halves(layer, inputs, dy))
    return {"forward": forward, "backward": backward, "both": forward + backward}


def timed(phase: str, function: Callable[[], object]) -> Run:
    """A run of one phase."""
    return lambda: {phase: laps(function)[0]}


def _gpu_laps(steps: Sequence[Callable[[], object]]) -> list[float]:
    driver, cache = _l2_cache()
    driver.clear_cache(cache)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
    events[0].record()
    for step, event in zip(steps, events[1:], strict=True):
        step()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(events)]


@functools.cache
def _l2_cache():  # type: ignore[no-untyped-def]  # Triton's driver has no types
    """Triton's own way to empty L2 between runs, the one that `triton.testing.do_bench` uses."""
    from triton.runtime import driver

    return driver.active, driver.active.get_empty_cache_for_benchmark()
