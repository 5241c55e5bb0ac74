"""Problems, choices and winners as a person reads them, on the command line and in a bring-up's page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict

from ..backends.triton import admissible
from ..kernels.entries import Choice, Entry, Trial
from ..kernels.heuristic import ALGORITHM_KEYS, CONFIGS, Key

__all__ = ["algorithm_words", "choice_words", "problem_words", "winner"]

_GATHERED = {"merged": "no gather", "split": "gather before", "fused": "one kernel, gather inside"}
"""Where each algorithm brings x's columns together by block."""


def problem_words(key: Key) -> str:
    """A key for a person."""
    sizes = "x".join(str(size) for size in (key.out_features, key.in_features) if size)
    sizes += "" if "x" in sizes else " columns"
    tokens = f" T≤{key.tokens}" if key.tokens else ""
    rank = f" ρ={key.rank}" if key.rank else ""
    turned = " transposed" if key.transposed else ""
    blocks = f" K={key.blocks}" if key.blocks else ""
    return f"{key.kernel} {sizes}{tokens}{rank}{blocks} {key.dtype}{turned}"


def choice_words(choice: Choice) -> str:
    """Launch parameters, or the name of an algorithm and where it gathers."""
    if isinstance(choice, str):
        return f"{choice} ({_GATHERED[choice]})"
    fields = asdict(choice).items()
    return " ".join(f"{name.removeprefix('block_').removeprefix('num_')}={value}" for name, value in fields)


def winner(entry: Entry) -> Trial | None:
    """The fastest trial that may be chosen: no algorithm that breaks the numbers, however fast."""
    kernel, dtype = entry.key.kernel, entry.key.dtype
    return entry.best(None if kernel in CONFIGS else admissible(kernel, dtype))


def algorithm_words(entries: Iterable[Entry]) -> Iterator[str]:
    """A line for each problem whose choice is an algorithm: what every one of them took."""
    for entry in entries:
        if entry.key.kernel in ALGORITHM_KEYS:
            timed = (trial for trial in entry.trials if trial.seconds is not None)
            times = ", ".join(f"{choice_words(t.choice)} {(t.seconds or 0.0) * 1e6:.1f} µs" for t in timed)
            yield f"{problem_words(entry.key)}: {times or 'none was timed'}"
