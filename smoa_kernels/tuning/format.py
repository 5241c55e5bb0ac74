"""Choices and winners as a person reads them, on the command line and in a bring-up's page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict

from ..backends.algorithms import admissible
from ..kernels.spec import ALGORITHM_KEYS
from ..kernels.table import Choice, Entry, Trial, describe

__all__ = ["describe_algorithms", "describe_choice", "winner"]

_GATHERED = {"merged": "no gather", "split": "gather before", "fused": "one kernel, gather inside"}
"""Where each algorithm brings x's columns together by block."""


def describe_choice(choice: Choice) -> str:
    """Name launch parameters, or an algorithm and where it gathers."""
    if isinstance(choice, str):
        return f"{choice} ({_GATHERED[choice]})"
    fields = asdict(choice).items()
    return " ".join(f"{name.removeprefix('block_').removeprefix('num_')}={value}" for name, value in fields)


def winner(entry: Entry) -> Trial | None:
    """Return the fastest trial that may be chosen: no algorithm that breaks the numbers, however fast."""
    kernel, dtype = entry.key.kernel, entry.key.dtype
    return entry.best(None if kernel not in ALGORITHM_KEYS else admissible(kernel, dtype))


def describe_algorithms(entries: Iterable[Entry]) -> Iterator[str]:
    """Yield a line for each problem whose choice is an algorithm: what every one of them took."""
    for entry in entries:
        if entry.key.kernel in ALGORITHM_KEYS:
            timed = (trial for trial in entry.trials if trial.seconds is not None)
            times = ", ".join(f"{describe_choice(t.choice)} {(t.seconds or 0.0) * 1e6:.1f} µs" for t in timed)
            yield f"{describe(entry.key)}: {times or 'none was timed'}"
