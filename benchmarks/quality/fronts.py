"""``benchmarks/results/forgetting.md``: accuracy against nats on general text, and methods at equal accuracy."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
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
from .forgetting import (
    CONTIGUOUS,
    DECAY,
    DROPOUT,
    FRONTS,
    HIRA,
    JOBS,
    LORA,
    LORA_HALF,
    RANDOM,
    RATES,
    SEEDS,
    SMOA,
)
from .plots import BASE, DASHES

TEMPLATE = Path(__file__).with_name("fronts.md")
WHOLE, CHATS, SEQUENCE = JOBS
NO_RUNS = "No runs yet."  # a section that says so is left out
PAIRS = [
    *((SMOA, LORA), (SMOA, LORA_HALF), (LORA_HALF, LORA), (HIRA, LORA)),
    *((CONTIGUOUS, LORA), (RANDOM, LORA), (DECAY, LORA), (DROPOUT, LORA)),
    *((SMOA, DECAY), (SMOA, DROPOUT), (SMOA, RANDOM)),
]
BOTH = ("score", "nats_more")
ALSO = {WHOLE: (0.85,), CHATS: (-2.49,)}  # further scores, which LoRA and SMoA reach without any one seed
BELOW = 0.01  # the score of comparison, under LoRA's at the rate that is best on validation
LEAST = 1e-3  # nats, for logarithms: too few to be measured
LARGEST_SHARE = 0.7  # of LoRA's nats, where SMoA counts as forgetting less
NAMES = {WHOLE: "forgetting", CHATS: "forgetting-chats"}  # of the figures
NOTES = {
    DECAY: "Weight decay 3 is AdamW's on LoRA's factors; a usual 0.01 would take 0.3 % of an update in these 60 steps.",
    RANDOM: '"Random" draws SMoA\'s blocks in place of sorting by the spectrum.',
}
# Of an update, relative to W0's; means over layers.
SIZES = {"delta": "norm of ΔW, % of W0's", "peak": "largest singular value of ΔW, % of W0's"}


class Fronts:
    """Scores, which are accuracies or losses with the sign changed, and nats by method, learning rate and seed.

    Args:
        records: those of one job, as they were read from the file.
    """

    def __init__(self, records: Iterable[dict[str, Any]]) -> None:
        self.runs: dict[str, dict[float, dict[int, dict[str, Any]]]] = {}
        for run in sorted(records, key=lambda run: (run["lr"], run["seed"])):
            score = run["accuracy"] if "accuracy" in run else -run["loss"]
            whole = run | {"score": score, "logarithm": math.log(max(run["nats_more"], LEAST))}
            self.runs.setdefault(run["method"], {}).setdefault(run["lr"], {})[run["seed"]] = whole

    def mean(self, method: str, lr: float, field: str, seeds: Collection[int] | None = None) -> Mean:
        """The mean of a field over these seeds, or over all."""
        runs = self.runs[method][lr]
        return mean_of([runs[seed][field] for seed in seeds or runs])

    def seeds(self, *methods: str) -> set[int]:
        """The seeds with which these methods were run at all of their rates; none if one of them was not run."""
        return set.intersection(*(set(r) for m in methods for r in self.runs.get(m, {0.0: {}}).values()))

    @property
    def best(self) -> float:
        """LoRA's learning rate that is best on validation."""
        rates = self.runs.get(LORA.name, {})
        if not all("validation_loss" in run for runs in rates.values() for run in runs.values()):
            return LEARNING_RATE["lora"]
        losses = {lr: self.mean(LORA.name, lr, "validation_loss").value for lr in rates}
        return min(losses, key=losses.__getitem__, default=math.nan)

    def target(self, seeds: Collection[int]) -> float:
        """The score at which methods are compared; NaN before LoRA's runs at its best rate.

        By the mean over seeds; of accuracies by the median, since a run that failed moves their mean below all others.
        """
        runs = self.runs.get(LORA.name, {}).get(self.best, {})
        if not (runs and seeds):
            return math.nan
        scores = [runs[seed]["score"] for seed in seeds]
        return (fmean if "loss" in runs[min(seeds)] else median)(scores) - BELOW

    def nats(self, method: str, score: float, seeds: Collection[int]) -> float:
        """The logarithm of nats where the front first reaches a score; NaN if that is not between two rates."""
        fields = ("score", "logarithm")
        front = [[self.mean(method, lr, field, seeds).value for field in fields] for lr in self.runs[method]]
        for (worse, few), (better, many) in pairwise(front):
            if worse < score <= better:
                return few + (many - few) * (score - worse) / (better - worse)
        return math.nan

    def share(self, ours: str, theirs: str, score: float | None = None) -> Mean | None:
        """The logarithm of one method's nats over another's at equal score, with the jackknife's interval.

        None without a seed of all runs, or if a front does not reach the score, by default the target.
        """
        seeds = self.seeds(ours, theirs, LORA.name)
        if not seeds:
            return None
        reached = self.target(seeds) if score is None else score

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


def by_job(records: Iterable[dict[str, Any]]) -> dict[str, Fronts]:
    """The fronts of each job."""
    found = list(records)
    return {job: Fronts(run for run in found if run["task"] == job) for job in JOBS}


def generate(records: Path, folder: Path) -> list[Path]:
    """Write the page and its figures from the runs in a file; return their paths."""
    found = store.read(records)
    store.check_one_setting(found)
    fronts = by_job(found)
    drawn = {"forgetting-why": reasons(fronts[WHOLE])}
    drawn |= {NAMES[job]: figure(fronts[job], job) for job in NAMES}
    texts = {"forgetting.md": page(found), **{f"{name}.svg": svg(each) for name, each in drawn.items()}}
    for name, text in texts.items():
        write(folder / name, text)
    return [folder / name for name in texts]


def page(records: Sequence[dict[str, Any]]) -> str:
    """The page's text, without sections that have no runs."""
    fronts, before = by_job(records), records[0]["nats_before"]
    text = TEMPLATE.read_text(encoding="utf-8").format(
        runs=len(records),
        planned=sum(SEEDS[job] * sum(map(len, rates.values())) for job, rates in RATES.items()),
        device="; ".join(sorted({run["machine"]["device"] for run in records})),
        before=", ".join(f"{nats:.2f} ({kind})" for kind, nats in before.items()),
        best=LEARNING_RATE["lora"],
        rates=all_rates(fronts[WHOLE]),
        notes=" ".join(note for method, note in NOTES.items() if method.name in fronts[WHOLE].runs),
        shares=all_shares(fronts[WHOLE], WHOLE),
        held=verdict(fronts[WHOLE]),
        chats=all_rates(fronts[CHATS]),
        chat_best=f"{fronts[CHATS].best:g}",
        chat_shares=all_shares(fronts[CHATS], CHATS),
        chat_held=verdict(fronts[CHATS]),
        sequence=in_sequence(fronts[SEQUENCE], fronts[WHOLE]),
        largest=LARGEST_SHARE,
        below=BELOW,
        **{field: f"{fronts[WHOLE].error(field):.2f}" for field in SIZES},
    )
    return "\n## ".join(part for part in text.replace("\n\n\n", "\n").split("\n## ") if NO_RUNS not in part)


def verdict(fronts: Fronts) -> str:
    """Whether SMoA forgets less than LoRA of either rank, by the study's rule."""
    found = [fronts.share(SMOA.name, theirs.name) for theirs in (LORA, LORA_HALF)]
    if any(share is None or math.isnan(share.high) for share in found):
        return "that is not shown, since a share or its interval is missing"
    met = [share is not None and share.value <= math.log(LARGEST_SHARE) and share.high < 0 for share in found]
    return f"it {'does' if all(met) else 'does not'}"


def all_rates(fronts: Fronts) -> str:
    """A table with a row for each method and learning rate."""
    runs = [run for rates in fronts.runs.values() for by_seed in rates.values() for run in by_seed.values()]
    if not runs:
        return NO_RUNS
    score = "accuracy, %" if "accuracy" in runs[0] else "loss"
    columns = ("method", "parameters", "learning rate", "seeds", score, "nats more", *runs[0]["nats"])
    rows = [row(fronts, method, lr) for method, rates in fronts.runs.items() for lr in rates]
    return table((*columns, "update", "largest", "along W0"), rows).strip()


def all_shares(fronts: Fronts, job: str) -> str:
    """A table of one method's nats over another's at equal score."""
    target = fronts.target(fronts.seeds(LORA.name))
    rows = []
    for ours, theirs in PAIRS:
        for at in (target, *ALSO[job]):
            if (share := fronts.share(ours.name, theirs.name, at)) is not None:
                known = not math.isnan(share.half_width)
                between = f"{math.exp(share.low):.2f} to {math.exp(share.high):.2f}" if known else "–"
                score = f"{100 * at:.1f}" if at > 0 else f"{-at:.3f}"
                rows.append((f"{ours.name} over {theirs.name}", score, f"{math.exp(share.value):.2f}", between,
                             f"{share.seeds}"))  # fmt: skip
    if not rows:
        return "No seed has the runs for it yet."
    score = "at accuracy, %" if target > 0 else "at loss"
    return table(("nats of", score, "share", "95 % interval", "seeds"), rows).strip()


def in_sequence(fronts: Fronts, first: Fronts) -> str:
    """A table of accuracy on the first task before and after the second, and on the second; of seeds with all three."""
    rows = []
    for method, rates in fronts.runs.items():
        for lr, by_seed in rates.items():
            known = first.runs.get(method, {}).get(lr, {})
            if runs := [run for seed, run in by_seed.items() if seed in known]:
                before = [known[run["seed"]]["accuracy"] for run in runs]
                after = [run["earlier"][0] for run in runs]
                lost = [b - a for b, a in zip(before, after, strict=True)]
                percent = [before, after, lost, [run["accuracy"] for run in runs]]
                cells = [with_error(mean_of(values), 100, 1) for values in percent]
                cells.append(with_error(mean_of([run["nats_more"] for run in runs]), 1, 2))
                rows.append((method, f"{lr:g}", f"{len(runs)}", *cells))
    columns = ("TREC-6 before, %", "after", "lost", "opinions, %", "nats more")
    return table(("method", "learning rate", "seeds", *columns), rows).strip() if rows else NO_RUNS


def with_error(mean: Mean, times: float, digits: int) -> str:
    """A mean, and its standard error if there is one."""
    error = f" ± {times * mean.standard_error:.{digits}f}" if mean.seeds > 1 else ""
    return f"{times * mean.value:.{digits}f}{error}"


def row(fronts: Fronts, method: str, lr: float) -> tuple[str, ...]:
    """A method at a learning rate."""
    runs = list(fronts.runs[method][lr].values())
    score = ("accuracy", 100, 1) if "accuracy" in runs[0] else ("loss", 1, 3)
    cells = [
        with_error(fronts.mean(method, lr, field), *digits) for field, *digits in (score, ("nats_more", 1, 2))
    ]
    kinds = [[run["nats"][kind] - run["nats_before"][kind] for run in runs] for kind in runs[0]["nats"]]
    cells += [f"{mean_of(values).value:.2f}" for values in kinds]
    cells += [f"{mean_of(*(run[f] for run in runs)).value:.1%}" for f in ("delta", "peak", "both")]
    return method, f"{runs[0]['parameters']:,}", f"{lr:g}", f"{len(runs)}", *cells


def figure(fronts: Fronts, job: str) -> Figure:
    """A line a method, a point a learning rate."""
    drawn = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes, times = drawn.subplots(), 100 if job == WHOLE else 1
    for method in FRONTS:
        x, y = ([fronts.mean(method.name, lr, f) for lr in fronts.runs.get(method.name, {})] for f in BOTH)
        values, errors = [abs(times * mean.value) for mean in x], [times * mean.half_width for mean in x]
        style: dict[str, Any] = {
            "color": BASE[method.kind],
            "ls": DASHES.get(method.name, "-"),
            "marker": "o",
        }
        axes.errorbar(
            values, [m.value for m in y], [m.half_width for m in y], errors, **style, label=method.name
        )
    if seeds := fronts.seeds(LORA.name):
        axes.axvline(abs(times * fronts.target(seeds)), color="#777777", linestyle="--", linewidth=0.8)
    axes.set(xlabel="accuracy on test, %" if job == WHOLE else "loss on test, nats a token", yscale="log")
    axes.set_ylabel("nats a token more than the base")
    if job != WHOLE:
        axes.invert_xaxis()  # better to the right, as in the other figure
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return drawn


def reasons(fronts: Fronts) -> Figure:
    """Nats of every run by two sizes of its update."""
    drawn = Figure(figsize=(6.4, 3.2), layout="constrained")
    panels = drawn.subplots(1, len(SIZES), sharey=True)
    for axes, (field, label) in zip(panels, SIZES.items(), strict=True):
        for method in FRONTS:
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
