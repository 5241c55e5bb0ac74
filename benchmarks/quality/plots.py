"""The study's two figures, in the colours of the other benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

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
    """A method's colour: its family's, or another where its blocks are not the paper's."""
    found = BY_NAME[method]
    if found.random:
        return RANDOM
    if found.block_order == "contiguous":
        return CONTIGUOUS
    return GRANULES if found.granule > 1 else BASE[found.kind]


def figures(study: Study) -> dict[str, str]:
    """SVG text by the end of its file's name."""
    texts = {"accuracy": svg(accuracy(study)), "learning-rate": svg(learning_rates(study))}
    scaled = [task for task in study.tasks if any(study.tried(task.name, m.name) for m in SCALINGS)]
    if scaled:
        names = ["SMoA K=2", *(m.name for m in SCALINGS)]
        texts["alpha"] = svg(learning_rates(study, scaled, names))
    return texts


def accuracy(study: Study) -> Figure:
    """Mean test accuracy with its interval: a panel a task, a row a method."""
    figure, axes = _panels(len(study.tasks), sharey=True)
    names = [m.name for m in METHODS if m.name in study.methods][::-1]
    for axis, task in zip(axes, study.tasks, strict=True):
        for row, name in enumerate(names):
            mean = study.mean(task.name, name)
            if mean is None:
                continue
            spread = mean.half_width if mean.seeds > 1 else 0.0
            axis.errorbar(100 * mean.value, row, xerr=100 * spread, fmt="o", color=colour(name), capsize=3)
        base = study.mean(task.name, "LoRA")
        if base is not None:
            axis.axvline(100 * base.value, color=BASE["lora"], linewidth=0.8, alpha=0.5, zorder=0)
        shown = [m for n in names if n != "none" if (m := study.mean(task.name, n)) is not None]
        if shown:  # what is not adapted may lie far off, and is in the table
            low = min(m.low if m.seeds > 1 else m.value for m in shown)
            high = max(m.high if m.seeds > 1 else m.value for m in shown)
            axis.set_xlim(100 * low - 2, 100 * high + 2)
        axis.set(title=task.title, xlabel="accuracy on test, %", yticks=range(len(names)), yticklabels=names)
        _plain(axis)
    return figure


def learning_rates(
    study: Study, tasks: Sequence[Task] | None = None, names: Sequence[str] | None = None
) -> Figure:
    """Accuracy on validation by learning rate: a panel a task, a line a method."""
    tasks = tasks or study.tasks
    figure, axes = _panels(len(tasks), sharey=False)
    for axis, task in zip(axes, tasks, strict=True):
        for name in names or study.methods:
            tried = study.tried(task.name, name)
            if not tried or name == "none" or (names is None and not study.finals(task.name, name)):
                continue
            style = DASHES.get(name, "-")
            axis.plot(
                list(tried),
                [100 * v for v in tried.values()],
                linestyle=style,
                color=colour(name),
                label=name,
                linewidth=1.4,
            )
            best = best_rate(study.records, task.name, name)
            if best is not None:
                axis.plot([best], [100 * tried[best]], "o", color=colour(name), markersize=4)
        axis.set(title=task.title, xlabel="learning rate", xscale="log", ylabel="accuracy on validation, %")
        _plain(axis)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return figure


def _panels(count: int, sharey: bool) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(PANEL * count + 2.0, 3.6), layout="constrained")
    return figure, figure.subplots(1, count, sharey=sharey, squeeze=False)[0]


def _plain(axis: Axes) -> None:
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
