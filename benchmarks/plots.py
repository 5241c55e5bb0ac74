"""The report's figure. One colour is one method everywhere: Okabe and Ito's, safe for colour-blind readers."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from . import tables
from .providers import HIRA, LORA, PAPER, SMOA
from .results import Result, Run

matplotlib.rcParams["svg.hashsalt"] = "smoa"  # makes the file reproducible
matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text: small, searchable
matplotlib.rcParams |= {"font.family": "sans-serif", "axes.titlesize": 9, "axes.labelsize": 9}

COLOURS = {SMOA: "#009E73", LORA: "#0072B2", HIRA: "#E69F00", PAPER: "#CC79A7"}


def overview(runs: Sequence[Run]) -> Figure | None:
    """Forward and backward over frozen by method: a panel per machine, its largest layer at K=4 in each dtype."""
    cases = {run.slug: _largest(run) for run in runs}
    shown = [run for run in runs if cases[run.slug]]
    if not shown:
        return None
    figure = Figure(figsize=(4.6 * len(shown) + 1.2, 3.6), layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axis, run in zip(axes, shown, strict=True):
        results = cases[run.slug]
        for place, name in enumerate(COLOURS):
            q = [result.comparison("both").ratio(name) for result in results]
            bars = axis.bar(
                [i + (place - 1.5) * 0.2 for i in range(len(results))],
                [each.median for each in q],
                width=0.18,
                yerr=[[each.median - each.low for each in q], [each.high - each.median for each in q]],
                color=COLOURS[name],
                label=tables.NAMES.get(name, name),
            )
            axis.bar_label(bars, [f"{each.median:.2f}" for each in q], fontsize=8, padding=2)
        axis.axhline(1.0, color="#000000", linewidth=1.0, label="the frozen layer alone", zorder=0)
        axis.set_xticks(range(len(results)), [str(result.params["dtype"]) for result in results])
        p = results[0].params
        axis.set_title(
            f"{run.machine['device']} ({run.label})\n"
            f"T={p['tokens']}, {p['out_features']}×{p['in_features']}, r={p['rank']}, K={p['num_blocks']}"
        )
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("forward + backward, over frozen")
    figure.legend(
        *axes[-1].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False
    )
    return figure


def _largest(run: Run) -> list[Result]:
    """The layer with four blocks and the most multiplications, in each dtype, without doubtful results."""
    found: dict[str, Result] = {}
    for result in run.select("layer", num_blocks=4, dropout=0.0):
        p = result.params
        if result.comparison("both").doubt or not COLOURS.keys() <= result.seconds["both"].keys():
            continue
        best = found.setdefault(p["dtype"], result)
        if _work(p) > _work(best.params):
            found[p["dtype"]] = result
    return list(found.values())


def _work(params: Mapping[str, Any]) -> int:
    return math.prod(params[name] for name in ("tokens", "out_features", "in_features"))


def svg(figure: Figure) -> str:
    """The figure's file, the same for the same data."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
