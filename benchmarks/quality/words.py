"""How the study's figures are written."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .methods import BY_NAME
from .statistics import Mean

NAMES = {"none": "no adapter"}


def title(name: str) -> str:
    """A method's name in a table."""
    method = BY_NAME[name]
    rank = f", r={method.r}" if method.kind != "none" and "r=" not in name else ""
    words = NAMES.get(name, name)
    if method.kind == "smoa" and not name.startswith("SMoA"):
        words = f"SMoA {name}"
    return f"{words}{rank}"


def percent(mean: Mean) -> str:
    """A mean with its standard error."""
    return f"{100 * mean.value:.1f}" + (f" ± {100 * mean.standard_error:.1f}" if mean.seeds > 1 else "")


def points(mean: Mean) -> str:
    """A difference in points of accuracy with its interval."""
    if math.isnan(mean.half_width):
        return f"{100 * mean.value:+.1f}"
    return f"{100 * mean.value:+.1f} [{100 * mean.low:+.1f}, {100 * mean.high:+.1f}]"


def word(mean: Mean) -> str:
    """Whether an interval lies above zero, below zero or around it."""
    if math.isnan(mean.half_width):
        return "one seed, so no interval"
    if mean.low > 0:
        return "above zero"
    if mean.high < 0:
        return "below zero"
    return "not significantly different from zero"


def listed(rates: Iterable[float]) -> str:
    """Rates in a sentence."""
    return ", ".join(f"{rate:g}" for rate in rates)
