"""What came out, in words: how the study's two goals stand, how much one task decides of that, what was not run."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..tables import table
from .analysis import Mean, Study
from .methods import ABLATIONS, BY_NAME, METHODS, ORDERS

LORA, LORA_HALF, HALF, EQUAL = "LoRA", "LoRA, r=4", "SMoA K=2", "SMoA K=2, r=16"
EQUALS = (EQUAL, "SMoA K=4, r=32", "SMoA K=8, r=64")  # as many parameters as LoRA
ENOUGH = 3  # of five tasks: the goal was set before there was a sixth


def title(name: str) -> str:
    """A method's name in a table."""
    method = BY_NAME[name]
    rank = f", r={method.r}" if method.kind != "none" and "r=" not in name else ""
    words = "no adapter" if name == "none" else name
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


def verdicts(study: Study) -> str:
    """The goals, as the figures answer them, and the averages beside them."""
    lines = [f"- **Goal, half of LoRA's parameters** ({HALF}): {at_half(study)}"] if within(study) else []
    for words, ours, theirs in (
        *(("Goal, equal parameters: above LoRA on average", ours, LORA) for ours in EQUALS),
        *(("Goal, spectral against random blocks", ours, random) for random, ours in ABLATIONS.items()),
        *(("Another order against the spectral one", *pair) for pair in ORDERS.items()),
        ("Half of the parameters, on average", HALF, LORA),
        ("Half of the parameters, against a LoRA of that size, on average", HALF, LORA_HALF),
    ):
        difference = study.overall(ours, theirs)
        if difference is not None:
            lines.append(
                f"- **{words}** ({ours} minus {theirs}): {points(difference)} points, {word(difference)}."
            )
    return "\n".join(lines)


def at_half(study: Study) -> str:
    """On how many tasks SMoA at half of LoRA's parameters is within LoRA's standard error, or above LoRA."""
    held = within(study)
    good = [name for name, is_within in held.items() if is_within]
    learned = [task.title for task in study.tasks if task.title in held and study.learned(task.name)]
    both = [name for name in good if name in learned]
    return (
        "mean accuracy within one standard error of LoRA's, or above, "
        f"on {len(good)} of {len(held)} tasks{': ' + ', '.join(good) if good else ''}; "
        f"of the {len(learned)} where some method is significantly better than no adapter, on {len(both)}. "
        f"The goal was {ENOUGH} of five: {'met' if len(good) >= ENOUGH else 'missed'}."
    )


def within(study: Study) -> dict[str, bool]:
    """By task: whether SMoA at half of LoRA's parameters is within LoRA's standard error, or above LoRA."""
    found = {}
    for task in study.tasks:
        ours, theirs = study.mean(task.name, HALF), study.mean(task.name, LORA)
        if ours and theirs and theirs.seeds > 1:
            found[task.title] = ours.value >= theirs.value - theirs.standard_error
    return found


def without_one_task(study: Study) -> str:
    """The averages with each task left out in turn."""
    rows = []
    for ours, theirs in (
        (HALF, LORA),
        *((ours, LORA) for ours in EQUALS),
        *((ours, random) for random, ours in ABLATIONS.items()),
        *ORDERS.items(),
    ):
        kept = [[task for task in study.tasks if task is not left_out] for left_out in (None, *study.tasks)]
        means = [study.overall(ours, theirs, tasks) for tasks in kept]
        cells = [points(mean) for mean in means if mean is not None]
        if cells and len(cells) == len(means):
            rows.append((f"{title(ours)} − {title(theirs)}", *cells))
    return table(("difference", "all tasks", *(f"without {task.title}" for task in study.tasks)), rows)


def not_run(study: Study) -> str:
    """By method: the tasks on which it was not judged, and how many rates were tried on them all the same."""
    lines = []
    for name in (method.name for method in METHODS):
        holes = []
        for task in study.tasks:
            if not study.finals(task.name, name):
                tried = len(study.tried(task.name, name))
                holes.append(task.title + (f" ({tried} rates tried, none judged on test)" if tried else ""))
        if holes:
            lines.append(f"- {title(name)}: {', '.join(holes)}")
    return "\n".join(lines)
