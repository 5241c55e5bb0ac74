"""``benchmarks/results/forgetting.md``: accuracy against nats on general text, and methods at equal accuracy."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from adapters import LEARNING_RATE
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from ..plots import svg
from ..results import write
from ..tables import table
from . import store
from .analysis import Mean, mean_of
from .forgetting import HIRA, LORA, LORA_HALF, RATES, SMOA
from .plots import BASE, DASHES

TEMPLATE = Path(__file__).with_name("fronts.md")
SEEDS = 5
PAIRS = [
    (ours.name, theirs.name)
    for ours, theirs in ((SMOA, LORA), (SMOA, LORA_HALF), (LORA_HALF, LORA), (HIRA, LORA))
]
BOTH = ("accuracy", "nats_more")
ALSO = (0.85,)  # accuracies of comparison that all methods reach without any one seed
BELOW = 0.01  # the accuracy of comparison, under LoRA's at the rate that is best on validation
LEAST = 1e-3  # nats, for logarithms: too few to be measured
LARGEST_SHARE = 0.7  # of LoRA's nats, where SMoA counts as forgetting less
# Of an update, relative to W0's; means over layers.
SIZES = {"delta": "norm of ΔW, % of W0's", "peak": "largest singular value of ΔW, % of W0's"}


class Fronts:
    """Accuracy and nats by method, learning rate and seed.

    Args:
        records: as they were read from the file.
    """

    def __init__(self, records: Iterable[dict[str, Any]]) -> None:
        self.runs: dict[str, dict[float, dict[int, dict[str, Any]]]] = {}
        for run in sorted(records, key=lambda run: (run["lr"], run["seed"])):
            whole = run | {"logarithm": math.log(max(run["nats_more"], LEAST))}
            self.runs.setdefault(run["method"], {}).setdefault(run["lr"], {})[run["seed"]] = whole

    def mean(self, method: str, lr: float, field: str, seeds: Collection[int] | None = None) -> Mean:
        """The mean of a field over these seeds, or over all."""
        runs = self.runs[method][lr]
        return mean_of([runs[seed][field] for seed in seeds or runs])

    def seeds(self, *methods: str) -> set[int]:
        """The seeds with which these methods were run at all of their rates; none if one of them was not run."""
        return set.intersection(*(set(r) for m in methods for r in self.runs.get(m, {0.0: {}}).values()))

    def target(self, seeds: Collection[int]) -> float:
        """The accuracy at which methods are compared; NaN before LoRA's runs at its best rate.

        By the median over seeds, since a run that failed would move the mean below all others.
        """
        runs = self.runs[LORA.name].get(LEARNING_RATE["lora"], {})
        return median(runs[seed]["accuracy"] for seed in seeds) - BELOW if runs else math.nan

    def nats(self, method: str, accuracy: float, seeds: Collection[int]) -> float:
        """The logarithm of nats where the front first reaches an accuracy; NaN if that is not between two rates."""
        fields = ("accuracy", "logarithm")
        front = [[self.mean(method, lr, field, seeds).value for field in fields] for lr in self.runs[method]]
        for (worse, few), (better, many) in pairwise(front):
            if worse < accuracy <= better:
                return few + (many - few) * (accuracy - worse) / (better - worse)
        return math.nan

    def share(self, ours: str, theirs: str, accuracy: float | None = None) -> Mean | None:
        """The logarithm of one method's nats over another's at equal accuracy, with the jackknife's interval.

        None without a seed of all runs, or if a front does not reach the accuracy, by default the target.
        """
        seeds = self.seeds(ours, theirs, LORA.name)
        if not seeds:
            return None
        reached = self.target(seeds) if accuracy is None else accuracy

        def estimate(seeds: Collection[int]) -> float:
            return self.nats(ours, reached, seeds) - self.nats(theirs, reached, seeds)

        if math.isnan(whole := estimate(seeds)):
            return None
        rest = len(seeds) - 1
        parts = [(rest + 1) * whole - rest * (estimate(seeds - {seed}) if rest else 0.0) for seed in seeds]
        return mean_of(parts)._replace(value=whole)

    def sizes(self, method: str, field: str) -> tuple[list[float], list[float]]:
        """A size of the update, the mean over layers, and the logarithm of nats of each of a method's runs."""
        runs = [run for by_seed in self.runs.get(method, {}).values() for run in by_seed.values()]
        return [mean_of(run[field]).value for run in runs], [run["logarithm"] for run in runs]

    def error(self, field: str) -> float:
        """The factor (root mean square) by which nats miss a parabola through all runs, in logarithms, over a size."""
        x, y = np.hstack([self.sizes(method, field) for method in self.runs])
        parabola = np.polynomial.Polynomial.fit(np.log(x), y, 2)
        return math.exp(np.square(parabola(np.log(x)) - y).mean() ** 0.5)


def generate(records: Path, folder: Path) -> list[Path]:
    """Write the page and its figure from the runs in a file; return their paths."""
    found = store.read(records)
    store.check_one_setting(found)
    drawn = {"forgetting": figure(Fronts(found)), "forgetting-why": reasons(Fronts(found))}
    texts = {"forgetting.md": page(found), **{f"{name}.svg": svg(each) for name, each in drawn.items()}}
    for name, text in texts.items():
        write(folder / name, text)
    return [folder / name for name in texts]


def page(records: Sequence[dict[str, Any]]) -> str:
    """The page's text."""
    fronts, before = Fronts(records), records[0]["nats_before"]
    target = fronts.target(fronts.seeds(LORA.name))
    tried = [(pair, at, fronts.share(*pair, at)) for pair in PAIRS for at in (target, *ALSO)]
    shares = [(pair, at, share) for pair, at, share in tried if share is not None]
    ours = [share for (name, _), at, share in shares if name == SMOA.name and at == target]
    met = [share.value <= math.log(LARGEST_SHARE) and share.high < 0 for share in ours]
    known = len(ours) == 2 and not any(math.isnan(share.high) for share in ours)
    held = "is open" if not known else "holds" if all(met) else "does not hold"
    columns = ("method", "parameters", "learning rate", "seeds", "accuracy, %", "nats more", *before)
    rows = [row(fronts, method, lr) for method, rates in fronts.runs.items() for lr in rates]
    compared = [
        (
            " over ".join(pair),
            f"{100 * at:.1f}",
            f"{math.exp(share.value):.2f}",
            f"{math.exp(share.low):.2f} to {math.exp(share.high):.2f}"
            if not math.isnan(share.half_width)
            else "–",
            f"{share.seeds}",
        )
        for pair, at, share in shares
    ]
    return TEMPLATE.read_text(encoding="utf-8").format(
        runs=len(records),
        planned=SEEDS * sum(map(len, RATES.values())),
        device="; ".join(sorted({run["machine"]["device"] for run in records})),
        before=", ".join(f"{nats:.2f} ({kind})" for kind, nats in before.items()),
        best=LEARNING_RATE["lora"],
        rates=table((*columns, "update", "largest", "along W0"), rows).strip(),
        shares=table(("nats of", "at accuracy, %", "share", "95 % interval", "seeds"), compared).strip()
        or "No seed has the runs for it yet.",
        largest=LARGEST_SHARE,
        held=held,
        **{field: f"{fronts.error(field):.2f}" for field in SIZES},
    )


def row(fronts: Fronts, method: str, lr: float) -> tuple[str, ...]:
    """A method at a learning rate."""
    runs = list(fronts.runs[method][lr].values())
    cells = []
    for field, times, digits in (("accuracy", 100, 1), ("nats_more", 1, 2)):
        mean = fronts.mean(method, lr, field)
        error = f" ± {times * mean.standard_error:.{digits}f}" if mean.seeds > 1 else ""
        cells.append(f"{times * mean.value:.{digits}f}{error}")
    kinds = [[run["nats"][kind] - run["nats_before"][kind] for run in runs] for kind in runs[0]["nats"]]
    cells += [f"{mean_of(values).value:.2f}" for values in kinds]
    cells += [f"{mean_of(*(run[f] for run in runs)).value:.1%}" for f in ("delta", "peak", "both")]
    return method, f"{runs[0]['parameters']:,}", f"{lr:g}", f"{len(runs)}", *cells


def figure(fronts: Fronts) -> Figure:
    """A line a method, a point a learning rate."""
    drawn = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = drawn.subplots()
    for method in RATES:
        x, y = ([fronts.mean(method.name, lr, f) for lr in fronts.runs.get(method.name, {})] for f in BOTH)
        values, errors = [100 * mean.value for mean in x], [100 * mean.half_width for mean in x]
        style: dict[str, Any] = {
            "color": BASE[method.kind],
            "ls": DASHES.get(method.name, "-"),
            "marker": "o",
        }
        axes.errorbar(
            values, [m.value for m in y], [m.half_width for m in y], errors, **style, label=method.name
        )
    if seeds := fronts.seeds(LORA.name):
        axes.axvline(100 * fronts.target(seeds), color="#777777", linestyle="--", linewidth=0.8)
    axes.set(xlabel="accuracy on test, %", ylabel="nats a token more than the base", yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return drawn


def reasons(fronts: Fronts) -> Figure:
    """Nats of every run by two sizes of its update."""
    drawn = Figure(figsize=(6.4, 3.2), layout="constrained")
    panels = drawn.subplots(1, len(SIZES), sharey=True)
    for axes, (field, label) in zip(panels, SIZES.items(), strict=True):
        for method in RATES:
            x, logarithms = fronts.sizes(method.name, field)
            open_marker = {"mfc": "none"} if method.name in DASHES else {}
            axes.plot(x, np.exp(logarithms), "o", color=BASE[method.kind], label=method.name, **open_marker)
        axes.set(xlabel=label, xscale="log", yscale="log")
        axes.set_xticks([0.003, 0.01, 0.03, 0.1, 0.3], ["0.3", "1", "3", "10", "30"])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("nats a token more than the base")
    panels[-1].legend(fontsize=8, frameon=False)
    return drawn
