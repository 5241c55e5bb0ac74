"""The study's figures, in the colours of the other benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..plots import COLOURS, svg
from ..providers import HIRA, LORA, SMOA
from .analysis import Study
from .methods import BY_NAME, METHODS, SCALINGS
from .study import best_rate
from .tasks import Task

PANEL = 3.0  # inches
BASE = {"none": "#777777", "lora": COLOURS[LORA], "hira": COLOURS[HIRA], "smoa": COLOURS[SMOA]}
RANDOM, CONTIGUOUS, GRANULES = "#D55E00", "#56B4E9", "#CC79A7"
DASHES = {
    "LoRA, r=4": "--",
    "LoRA, alpha=2r": "--",
    "SMoA K=4": "--",
    "SMoA K=8": ":",
    "SMoA K=2, r=16": "-.",
    "SMoA K=4, r=32": (0, (1, 3)),
    "SMoA K=8, r=64": (0, (5, 1, 1, 1, 1, 1)),
    "contiguous K=4, r=32": (0, (1, 3)),
    "SMoA K=2, alpha=4r": "--",
    "SMoA K=2, alpha=16r": ":",
    "SMoA K=2, alpha=64r": "-.",
}


def colour(method: str) -> str:
    """A method's colour: its family's, or another if its blocks are not the paper's."""
    found = BY_NAME[method]
    if found.random:
        return RANDOM
    if found.block_order == "contiguous":
        return CONTIGUOUS
    return GRANULES if found.granule > 1 else BASE[found.kind]


def figures(study: Study) -> dict[str, str]:
    """SVG text by suffix of the file's name."""
    alphas = [method.name for method in SCALINGS]
    scaled = [task for task in study.tasks if any(study.tried(task.name, name) for name in alphas)]
    drawn = {"accuracy": accuracy(study), "learning-rate": learning_rates(study, study.tasks, study.methods)}
    if scaled:
        drawn["alpha"] = learning_rates(study, scaled, ["SMoA K=2", *alphas])
    return {name: svg(figure) for name, figure in drawn.items()}


def accuracy(study: Study) -> Figure:
    """Mean test accuracy with its interval: a panel a task, a row a method."""
    figure, axes = _panels(study.tasks, "accuracy on test, %", sharey=True)
    names = [m.name for m in METHODS if m.name in study.methods][::-1]
    for axis, task in zip(axes, study.tasks, strict=True):
        ends = []
        for row, name in enumerate(names):
            mean = study.mean(task.name, name)
            if mean is not None:
                spread = mean.half_width if mean.seeds > 1 else 0.0
                axis.errorbar(
                    100 * mean.value, row, xerr=100 * spread, fmt="o", color=colour(name), capsize=3
                )
                if name != "none":  # it may lie far off; the table has it
                    ends += [100 * (mean.value - spread), 100 * (mean.value + spread)]
                if name == "LoRA":
                    axis.axvline(100 * mean.value, color=BASE["lora"], linewidth=0.8, alpha=0.5, zorder=0)
        if ends:
            axis.set_xlim(min(ends) - 2, max(ends) + 2)
        axis.set(yticks=range(len(names)), yticklabels=names)
    return figure


def learning_rates(study: Study, tasks: Sequence[Task], names: Sequence[str]) -> Figure:
    """Accuracy on validation by learning rate: a panel per task, a line per method that was tried there."""
    figure, axes = _panels(tasks, "learning rate", sharey=False)
    for axis, task in zip(axes, tasks, strict=True):
        for name in names:
            tried, best = study.tried(task.name, name), best_rate(study.records, task.name, name)
            if best is not None and name != "none":
                percent = {rate: 100 * share for rate, share in tried.items()}
                style: dict[str, Any] = {"linestyle": DASHES.get(name, "-"), "linewidth": 1.4}
                axis.plot(list(percent), list(percent.values()), color=colour(name), label=name, **style)
                axis.plot([best], [percent[best]], "o", color=colour(name), markersize=4)
        axis.set(xscale="log", ylabel="accuracy on validation, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return figure


def _panels(tasks: Sequence[Task], xlabel: str, sharey: bool) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(PANEL * len(tasks) + 2.0, 3.6), layout="constrained")
    axes = figure.subplots(1, len(tasks), sharey=sharey, squeeze=False)[0]
    for axis, task in zip(axes, tasks, strict=True):
        axis.set(title=task.title, xlabel=xlabel)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes
