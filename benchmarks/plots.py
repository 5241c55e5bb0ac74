"""The report's figures. One colour is one provider everywhere; the colours are Okabe and Ito's, safe for colour-blind
readers, and each provider has a marker of its own besides."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from . import tables
from .protocol import Quartiles
from .providers import FROZEN, HIRA, LORA, PAPER, SMOA
from .results import Result, Run
from .tables import MIB, points

matplotlib.rcParams["svg.hashsalt"] = "smoa"  # the same figure gives the same file
matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text: small, searchable
matplotlib.rcParams |= {"font.family": "sans-serif", "axes.titlesize": 9, "axes.labelsize": 9}

STYLES = {
    FROZEN: ("#000000", "."),
    LORA: ("#0072B2", "s"),
    HIRA: ("#E69F00", "^"),
    PAPER: ("#CC79A7", "v"),
    SMOA: ("#009E73", "o"),
    f"{SMOA} split": ("#56B4E9", "D"),
    f"{SMOA} merged": ("#D55E00", "P"),
    f"{SMOA} expanded": ("#666666", "X"),
    f"{SMOA} fused": ("#666666", "X"),
}
THEORY: dict[str, Any] = {"linestyle": (0, (4, 3)), "linewidth": 1.0}


def figures(run: Run) -> dict[str, str]:
    """SVG text by the end of its file's name; a figure without data is left out."""
    drawn = {
        "ratio": ratio_by_blocks(run),
        "few-tokens": few_tokens(run),
        "memory": memory_by_tokens(run),
        "scaling": scaling(run),
    }
    return {name: svg(figure) for name, figure in drawn.items() if figure is not None}


def overview(runs: Sequence[Run]) -> Figure | None:
    """Forward and backward over frozen of each method: a panel a machine, its largest layer at K=4 in each dtype."""
    cases = {run.slug: _largest(run) for run in runs}
    shown = [run for run in runs if cases[run.slug]]
    if not shown:
        return None
    figure = Figure(figsize=(4.6 * len(shown) + 1.2, 3.6), layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    methods = (SMOA, LORA, HIRA, PAPER)
    for axis, run in zip(axes, shown, strict=True):
        results = cases[run.slug]
        for place, name in enumerate(methods):
            q = [result.comparison("both").ratio(name) for result in results]
            bars = axis.bar(
                [i + (place - 1.5) * 0.2 for i in range(len(results))],
                [each.median for each in q],
                width=0.18,
                yerr=[[each.median - each.low for each in q], [each.high - each.median for each in q]],
                color=STYLES[name][0],
                label=tables.NAMES.get(name, name),
            )
            axis.bar_label(bars, [f"{each.median:.2f}" for each in q], fontsize=8, padding=2)
        axis.axhline(1.0, color=STYLES[FROZEN][0], linewidth=1.0, label="the frozen layer alone", zorder=0)
        axis.set_xticks(range(len(results)), [str(result.params["dtype"]) for result in results])
        p = results[0].params
        axis.set_title(
            f"{run.machine['device']} ({run.label})\n"
            f"T={p['tokens']}, {p['out_features']}×{p['in_features']}, r={p['rank']}, K={p['num_blocks']}"
        )
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("forward + backward, over frozen")
    _legend(figure, axes[-1])
    return figure


def _largest(run: Run) -> list[Result]:
    """The layer with four blocks and the most multiplications, in each dtype; without what is in doubt."""
    found: dict[str, Result] = {}
    for result in run.select("layer", num_blocks=4, dropout=0.0):
        p = result.params
        if result.comparison("both").doubt or not {SMOA, LORA, HIRA, PAPER} <= result.seconds["both"].keys():
            continue
        best = found.setdefault(p["dtype"], result)
        if _work(p) > _work(best.params):
            found[p["dtype"]] = result
    return list(found.values())


def _work(params: Mapping[str, Any]) -> int:
    return math.prod(params[name] for name in ("tokens", "out_features", "in_features"))


def ratio_by_blocks(run: Run) -> Figure | None:
    """Forward and backward over frozen against K: the largest group of cases that differ in K only."""
    groups: dict[tuple[object, ...], list[Result]] = {}
    for result in run.select("layer"):
        key = tuple(value for name, value in result.params.items() if name != "num_blocks")
        groups.setdefault(key, []).append(result)
    results = max(groups.values(), key=len, default=[])
    if len(results) < 2:
        return None
    results.sort(key=lambda r: r.params["num_blocks"])
    figure, (axis,) = _canvas(run, 1, width=7.0)
    blocks = [r.params["num_blocks"] for r in results]
    for name in (PAPER, HIRA, f"{SMOA} split", SMOA, LORA):
        found = [
            (r.params["num_blocks"], r.comparison("both").ratio(name))
            for r in results
            if name in r.seconds["both"]
        ]
        _line(axis, name, [k for k, _ in found], [q for _, q in found])
    axis.plot(
        blocks, [1 + 1 / (2 * k) for k in blocks], color="#777777", label="1 + 1/(2K): GEMMs alone", **THEORY
    )
    _over_frozen(axis)
    p = results[0].params
    _axis(axis, blocks, "blocks, K", "forward + backward, over frozen")
    axis.set_title(f"T={p['tokens']}, {p['out_features']}×{p['in_features']}, r={p['rank']}, {p['dtype']}")
    _legend(figure, axis)
    return figure


def few_tokens(run: Run) -> Figure | None:
    """Forward of a few tokens over frozen, by dtype."""
    dtypes = list(dict.fromkeys(r.params["dtype"] for r in run.select("few tokens")))
    if not dtypes:
        return None
    figure, axes = _canvas(run, len(dtypes), sharey=True)
    for axis, dtype in zip(axes, dtypes, strict=True):
        results = sorted(run.select("few tokens", dtype=dtype), key=lambda r: r.params["tokens"])
        tokens = [r.params["tokens"] for r in results]
        names = [n for n in results[0].seconds["forward"] if n in STYLES and n not in (FROZEN, SMOA)]
        for name in (*names, SMOA):  # ours last, so that nothing covers it
            _line(axis, name, tokens, [r.comparison("forward").ratio(name) for r in results])
        _over_frozen(axis)
        _axis(axis, tokens, "tokens, T", "forward, over frozen" if axis is axes[0] else "")
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        p = results[0].params
        axis.set_title(f"{p['out_features']}×{p['in_features']}, r={p['rank']}, K={p['num_blocks']}, {dtype}")
    _legend(figure, axes[-1])
    return figure


def memory_by_tokens(run: Run) -> Figure | None:
    """What is saved for backward, and the peak, against T: the first case's layer at every T."""
    every = run.select("memory")
    if not every:
        return None
    same = {k: v for k, v in every[0].params.items() if k != "tokens"}
    results = sorted(run.select("memory", **same), key=lambda r: r.params["tokens"])
    tokens = [r.params["tokens"] for r in results]
    figure, axes = _canvas(run, 2)
    for axis, kind, label in zip(axes, ("saved", "peak"), ("saved for backward", "peak"), strict=True):
        for name in (PAPER, HIRA, LORA, SMOA, FROZEN):
            sizes = [r.bytes[name][kind] / MIB for r in results]
            if min(sizes) > 0:  # a frozen layer saves nothing of its own
                _line(axis, name, tokens, [Quartiles(size, size, size) for size in sizes])
        _axis(axis, tokens, "tokens, T", f"{label}, MiB")
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    p = results[0].params
    axes[0].set_title(
        f"{p['out_features']}×{p['in_features']}, r={p['rank']}, K={p['num_blocks']}, {p['dtype']}"
    )
    axes[1].set_title("of one training pass, weights apart")
    _legend(figure, axes[-1])
    return figure


def scaling(run: Run) -> Figure | None:
    """Milliseconds against T, N·C, r and K; dashed, the cost model at this machine's rates."""
    results = run.select("scaling")
    if not results:
        return None
    figure, axes = _canvas(run, len(results), width=12.0, height=3.4)
    for axis, result in zip(axes, results, strict=True):
        values = result.params["values"]
        for name in (FROZEN, LORA, SMOA):
            c = points(result, name)
            times = [c.time(f"{name} @ {v}") for v in values]
            _line(
                axis, name, values, [Quartiles(*(1e3 * s for s in (q.low, q.median, q.high))) for q in times]
            )
            theory = [1e3 * result.theory[f"{name} @ {v}"] for v in values]
            axis.plot(values, theory, color=STYLES[name][0], **THEORY)
        if result.params["axis"] in ("tokens", "weight elements"):  # the others hardly move the time
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
        else:
            axis.set_ylim(bottom=0)
        _axis(axis, values, AXES[result.params["axis"]], "forward + backward, ms" if axis is axes[0] else "")
    axes[-1].plot([], [], color="#777777", label="predicted", **THEORY)
    _legend(figure, axes[-1])
    return figure


AXES = {
    "tokens": "tokens, T",
    "weight elements": "weight elements, N·C",
    "rank": "rank, r",
    "blocks": "blocks, K",
}


def svg(figure: Figure) -> str:
    """The figure's file, the same for the same data."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def _canvas(
    run: Run, panels: int, *, width: float = 9.0, height: float = 3.8, sharey: bool = False
) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, panels, sharey=sharey, squeeze=False)[0]
    note = f"{run.label}: {run.machine['device']}" if not run.on_gpu else run.label
    figure.suptitle(f"{note}{', SMOKE' if run.machine['smoke'] else ''}", fontsize=8, color="#555555")
    return figure, axes


def _line(axis: Axes, name: str, x: Sequence[float], y: Sequence[Quartiles]) -> None:
    colour, marker = STYLES[name]
    middle = [q.median for q in y]
    spread = [[q.median - q.low for q in y], [q.high - q.median for q in y]]
    axis.errorbar(
        x,
        middle,
        yerr=spread,
        color=colour,
        marker=marker,
        markersize=8 if name == LORA else 5,  # seen where ours lies upon it
        linewidth=2.2 if name == SMOA else 1.4,
        capsize=2,
        label=name,
        zorder=3 if name == SMOA else 2,
    )


def _over_frozen(axis: Axes) -> None:
    axis.axhline(1.0, color=STYLES[FROZEN][0], linewidth=1.0, label=FROZEN, zorder=1)


def _axis(axis: Axes, ticks: Sequence[float], x: str, y: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [_short(int(tick)) for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set(xlabel=x, ylabel=y)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _short(value: int) -> str:
    side = math.isqrt(value)
    return f"{side}²" if value >= MIB // 4 and side**2 == value else str(value)


def _legend(figure: Figure, axis: Axes) -> None:
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
