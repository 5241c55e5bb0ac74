"""Problems, choices and winners as a person reads them, on the command line and in a bring-up's page."""

from __future__ import annotations

from dataclasses import asdict

from ..kernels.heuristic import CONFIGS, Key
from ..triton_backend import admissible
from .entries import Choice, Entry, Trial

__all__ = ["choice_words", "problem_words", "winner"]


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
    """Launch parameters, or the name of an algorithm."""
    if isinstance(choice, str):
        return choice
    fields = asdict(choice).items()
    return " ".join(f"{name.removeprefix('block_').removeprefix('num_')}={value}" for name, value in fields)


def winner(entry: Entry) -> Trial | None:
    """The fastest trial that may be chosen: no algorithm that breaks the numbers, however fast."""
    kernel, dtype = entry.key.kernel, entry.key.dtype
    return entry.best(None if kernel in CONFIGS else admissible(kernel, dtype))
