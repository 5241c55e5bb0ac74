"""Draw the pictures of what SMoA gives and costs, beside LoRA and HiRA, from the kept runs.

python -m benchmarks.overview      # docs/overview.svg, docs/robustness.svg, benchmarks/results/cost.svg
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .plots import COLOURS, svg
from .providers import ACCELERATED, HIRA, LORA, SMOA
from .quality import store
from .quality.__main__ import RECORDS
from .quality.analysis import Study, mean_of
from .readme import PROCESSORS
from .results import RESULTS, ROOT, Run, read_all, write

COLOUR = {**COLOURS, ACCELERATED: "#F0C46C"}
# The study's methods: their colours, and their labels with the label's place beside the point.
POINTS: dict[str, tuple[str, str, tuple[int, int]]] = {
    "LoRA, r=4": (LORA, "LoRA r=4", (7, -6)),
    "LoRA": (LORA, "LoRA r=8", (7, -4)),
    "HiRA": (HIRA, "HiRA r=8", (7, -1)),
    "SMoA K=2": (SMOA, "SMoA K=2, r=8", (7, 4)),
    "SMoA K=4": (SMOA, "SMoA K=4, r=8", (7, -3)),
}


def overview(study: Study, runs: Sequence[Run]) -> Figure:
    """Accuracy by trained parameters; memory of a step in bfloat16 (K=2), and time of a step in float32 (K=4)."""
    figure = Figure(figsize=(5.4, 4.4), layout="constrained")  # legible on a telephone
    grid = figure.add_gridspec(2, 2, height_ratios=[1.35, 1])
    points, memory, time = (figure.add_subplot(place) for place in (grid[0, :], grid[1, 0], grid[1, 1]))
    _points(points, study)
    steps = [run.select("step", dtype="bfloat16", num_blocks=2) for run in runs]
    peaks = next(found[0].bytes for found in steps if found)
    _bars(memory, {name: peaks[name]["peak"] / 2**20 for name in (SMOA, LORA, HIRA)}, "{:.0f}")
    memory.set_title("peak memory of a step,\nbfloat16, K=2, MiB")
    _bars(time, _times(runs), "{:.2f}")
    time.set_title("time of a step, float32,\nK=4, LoRA = 1, median of four CPUs")
    return figure


def _points(axis: Axes, study: Study) -> None:
    tasks = study.tasks
    whole = study.average(tasks[0].name, "LoRA", "parameters")
    for name, (family, label, place) in POINTS.items():
        mean = mean_of(*(list(study.accuracies(task.name, name).values()) for task in tasks))
        x, y = study.average(tasks[0].name, name, "parameters") / whole, 100 * mean.value
        axis.errorbar(x, y, yerr=100 * mean.half_width, fmt="o", color=COLOUR[family], capsize=3, linewidth=1)
        axis.annotate(label, (x, y), place, textcoords="offset points", fontsize=8.5, color=COLOUR[family])
    axis.set(xlim=(0.15, 1.2), xticks=(0.25, 0.5, 1), xlabel="trained parameters, LoRA r=8 = 1")
    axis.set_title("accuracy, %: mean of six short tasks with its 95 % interval")
    axis.spines[["top", "right"]].set_visible(False)


def _times(runs: Sequence[Run]) -> Mapping[str, float]:
    """The median over processors of each adapter's time, LoRA's being 1."""
    found = [run.select("step", dtype="float32", num_blocks=4) for run in runs]
    steps = [results[0].comparison("step") for results in found if results]
    ratios = {name: [step.ratio(name, LORA) for step in steps] for name in (SMOA, LORA, HIRA)}
    return {name: median(ratio.median for ratio in ratios[name] if ratio) for name in ratios}


def _bars(axis: Axes, values: Mapping[str, float], form: str) -> None:
    names = [name.removeprefix("PEFT ") for name in values]
    drawn = axis.bar(names, list(values.values()), color=[COLOUR[name] for name in values], width=0.65)
    axis.bar_label(drawn, fmt=form, fontsize=9)
    axis.set(yticks=(), ylim=(0, 1.15 * max(values.values())))
    axis.spines[["top", "right", "left"]].set_visible(False)


def robustness(study: Study) -> Figure:
    """Accuracy at one, two and four times LoRA's best learning rate: the mean of all runs that trained it."""
    figure = Figure(figsize=(4.4, 2.6), layout="constrained")
    axis = figure.subplots()
    methods = (
        (SMOA, "SMoA K=2, r=8", "SMoA K=2, r=8, LoRA's rate", ""),
        (LORA, "LoRA r=8", "LoRA", ", 1 times the rate"),
    )
    for family, label, name, once in methods:
        ends = (once, ", 2 times the rate", ", 4 times the rate")
        shares = [accuracy(study, name + end) for end in ends]
        axis.plot(range(3), shares, "o-", color=COLOUR[family], label=label)
        for place, share in enumerate(shares):
            below = 5 if family == SMOA else -13
            axis.annotate(f"{share:.1f}", (place, share), (4, below), textcoords="offset points", fontsize=9)
    axis.set(xticks=range(3), xticklabels=["LoRA's best", "twice", "four times"], xlim=(-0.2, 2.4))
    axis.set(xlabel="learning rate", ylabel="accuracy, %", ylim=(25, 72))
    axis.legend(frameon=False, fontsize=9, loc="lower left")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def accuracy(study: Study, name: str) -> float:
    """Mean accuracy of all of a method's runs, in percent."""
    runs = [run for task in (*study.tasks, *study.controls) for run in study.finals(task.name, name)]
    return 100 * float(sum(run["accuracy"] for run in runs)) / len(runs)


def cost(runs: Sequence[Run]) -> Figure:
    """The time of a training step by processor and dtype, PEFT's LoRA being 1."""
    names = (SMOA, ACCELERATED, HIRA)
    groups = []
    for run in runs:
        for dtype in ("float32", "bfloat16"):
            if found := [step for step in run.select("step", dtype=dtype) if "factors" not in step.params]:
                ratios = [found[0].comparison("step").ratio(name, LORA) for name in names]
                device = str(run.machine["device"])
                name = PROCESSORS.get(device, device).replace(" (", "\n(")
                label = f"{name}\n{dtype}, K={found[0].params['num_blocks']}"
                groups.append((label, [ratio.median if ratio else 0.0 for ratio in ratios]))
    figure = Figure(figsize=(7.4, 2.8), layout="constrained")
    axis = figure.subplots()
    for place, name in enumerate(names):
        heights = [values[place] for _, values in groups]
        places = [group + 0.27 * (place - 1) for group in range(len(groups))]
        axis.bar_label(
            axis.bar(places, heights, 0.25, color=COLOUR[name], label=name), fmt="{:.2f}", fontsize=6.5
        )
    axis.axhline(1, color=COLOUR[LORA], linewidth=1, label="PEFT LoRA = 1")
    axis.set_xticks(range(len(groups)), [label for label, _ in groups], fontsize=7)
    axis.set_ylabel("time of a training step")
    axis.legend(frameon=False, fontsize=8, ncols=2)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def drawn() -> dict[str, str]:
    """SVG text by path in the repository."""
    study, runs = Study(store.read(RECORDS)), [run for run in read_all(RESULTS) if not run.on_gpu]
    figures = {
        ROOT / "docs" / "overview.svg": overview(study, runs),
        ROOT / "docs" / "robustness.svg": robustness(study),
        RESULTS / "cost.svg": cost(runs),
    }
    return {path.relative_to(ROOT).as_posix(): svg(figure) for path, figure in figures.items()}


if __name__ == "__main__":
    for name, text in drawn().items():
        write(ROOT / name, text)
