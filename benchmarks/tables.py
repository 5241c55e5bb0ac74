"""The report's tables, in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from .cases import ONE_BILLION
from .goals import GOALS
from .protocol import ONE_ROUND, Quartiles, quartiles
from .providers import FROZEN, LORA, PAPER, SMOA
from .results import Result, Run

MIB = 2**20
RANDOM = "SmolLM2-135M's shape, random weights"  # what runs of before the real model's measured
PHASES = {"both": "forward + backward"}
NAMES = {PAPER: "the paper's dense way"}  # where a heading says it in full


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; "" where it would have no rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if not lines:
        return ""
    head = f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}\n"
    return head + "\n".join(lines) + "\n"


def ratio(q: Quartiles, doubt: str = "") -> str:
    """A median with its quartiles, or alone after a single round."""
    spread = "" if doubt == ONE_ROUND else f" [{q.low:.2f}, {q.high:.2f}]"
    return marked(f"{q.median:.2f}{spread}", doubt)


def marked(text: str, doubt: str) -> str:
    """A figure, followed by the reason why it is not judged, if any."""
    return f"{text}, {doubt}, not judged" if doubt else text


def case_name(result: Result) -> str:
    """A layer's problem in words."""
    p = result.params
    shape = f"{p['out_features']}×{p['in_features']}"
    dropout = f", dropout {p['dropout']}" if p["dropout"] else ""
    return f"T={p['tokens']}, {shape}, r={p['rank']}, K={p['num_blocks']}, {p['dtype']}{dropout}"


def ratios(run: Run, results: Sequence[Result], phase: str, names: Sequence[str] | None = None) -> str:
    """One row a case of a run: the baseline's milliseconds and spread, then each provider's ratio to it."""
    found = [(result, result.comparison(phase)) for result in results]
    if names is None:
        every = dict.fromkeys(name for _, c in found for name in c.seconds if name != c.baseline)
        names = list(every)
    rows = [
        (
            case_name(result),
            f"{c.time(c.baseline).median * 1e3:.3g} ms, {c.spread:.0%}",
            *(ratio(c.ratio(name), c.doubt) if name in c.seconds else "–" for name in names),
        )
        for result, c in found
    ]
    return table(
        [
            f"{PHASES.get(phase, phase)} over frozen, {run.label}",
            "frozen, spread",
            *(NAMES.get(n, n) for n in names),
        ],
        rows,
    )


def memory(run: Run) -> str:
    """One row a case and provider, in MiB."""
    kinds = ("saved", "peak", "forward_workspace", "backward_workspace")
    rows = [
        (case_name(result), NAMES.get(name, name), *(f"{sizes[kind] / MIB:.1f}" for kind in kinds))
        for result in run.select("memory")
        for name, sizes in result.bytes.items()
    ]
    headings = (
        f"MiB, {run.label}",
        "",
        "saved for backward",
        "peak",
        "workspace, forward",
        "workspace, backward",
    )
    return table(headings, rows)


def experts(run: Run) -> str:
    """One row a layer of experts and provider: over frozen, over PEFT's LoRA, and the peak beside frozen's."""
    rows = []
    for kind, phase in (("experts", "both"), ("experts, one token", "forward")):
        for result in run.select(kind):
            p, c = result.params, result.comparison(phase)
            pairs = f"{p['pairs']} pairs an expert" if p["pairs"] else "one token, forward"
            case = f"{pairs}, E={p['experts']}, H={p['hidden']}, I={p['intermediate']}, {p['dtype']}"
            for name in c.seconds:
                peak = f"{result.bytes[name]['peak'] / MIB:.1f}" if result.bytes else "–"
                over = (ratio(c.ratio(name), c.doubt), ratio(c.ratio(name, LORA), c.doubt))
                rows.append((case, name, *over, peak))
    return table((run.label, "", "over frozen", "over PEFT LoRA", "peak, MiB"), rows)


def steps(run: Run) -> str:
    """One row a method: seconds, tokens per second, over LoRA, and the peak above model and optimizer."""
    rows = []
    for result in run.select("step"):
        p, c = result.params, result.comparison("step")
        factors = ", factors too" if "factors" in p else ""
        for name in c.seconds:
            seconds = c.time(name).median
            rows.append(
                (
                    f"{p.get('model', RANDOM)}, {p.get('dtype', 'float32')}{factors}, "
                    f"{p['batch']} × {p['length']} tokens",
                    f"{name}, K={p['num_blocks']}" if name == SMOA else name,
                    f"{seconds:.3g}",
                    f"{p['batch'] * p['length'] / seconds:.0f}",
                    ratio(c.ratio(name), c.doubt),
                    f"{result.bytes[name]['peak'] / MIB:.0f}",
                )
            )
    return table((run.label, "", "s / step", "tokens / s", "over PEFT LoRA", "peak, MiB"), rows)


def partitions(run: Run) -> str:
    """One row a shape; the last one is a whole model, extrapolated from its distinct shapes."""
    rows = []
    for result in run.select("partition"):
        p, c = result.params, result.comparison("partition")
        rows.append(
            (
                f"{p['out_features']}×{p['in_features']}",
                f"{c.time('SVD').median:.3g}",
                f"{c.time('partition').median:.3g}",
                ratio(c.ratio("partition"), c.doubt),
                str(len(c.seconds["SVD"])),
            )
        )
    svd, ours = (one_billion(run, name) for name in ("SVD", "partition"))
    if svd is not None and ours is not None:
        name = f"all {sum(ONE_BILLION.values())} layers of Llama-3.2-1B's shape, extrapolated"
        rows.append((name, f"{svd:.0f}", f"{ours:.0f}", f"{ours / svd:.2f}", "–"))
    headings = (
        "SVD, s",
        "partition, s",
        "partition over SVD",
        "rounds",
    )
    return table((run.label, *headings), rows)


def one_billion(run: Run, name: str) -> float | None:
    """Seconds for all layers of a model of a billion parameters: one layer of each shape, times their count."""
    total = 0.0
    for (rows, columns), count in ONE_BILLION.items():
        result = run.find("partition", out_features=rows, in_features=columns)
        if result is None:
            return None
        total += count * result.comparison("partition").time(name).median
    return total


def life_cycle(run: Run) -> str:
    """One row a method: seconds to inject, save and load, and the size on disk."""
    rows = []
    for result in run.select("adapter"):
        for name, sizes in result.bytes.items():
            phases = [result.comparison(phase) for phase in ("inject", "save", "load")]
            times = (marked(f"{c.time(name).median:.3g}", c.doubt) for c in phases)
            rows.append((name, *times, f"{sizes['files'] / MIB:.2f}"))
    return table((run.label, "inject, s", "save, s", "load, s", "on disk, MiB"), rows)


def scaling(run: Run) -> str:
    """Log-log slopes of the time, and of what it exceeds frozen's by."""
    rows = []
    for result in run.select("scaling"):
        values, c = result.params["values"], result.comparison("both")
        for name in (FROZEN, LORA, SMOA):
            at = [(f"{name} @ {v}", f"{FROZEN} @ {v}") for v in values]
            slopes = [log_log_slope(values, [c.time(ours).median for ours, _ in at])]
            if name != FROZEN:
                slopes.append(log_log_slope(values, [c.added(*pair).median for pair in at]))
            cells = ["–" if math.isnan(slope) else f"{slope:+.2f}" for slope in slopes]
            axis = marked(f"{result.params['axis']}, {values[0]} to {values[-1]}", result.doubt)
            rows.append((axis, name, *cells, *["–"] * (2 - len(cells))))
    return table((f"grows with, {run.label}", "", "time", "time over frozen's"), rows)


def log_log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of log y over log x: the power of x with which y grows; NaN where y is not positive."""
    if min(y) <= 0:
        return math.nan
    slope: float = statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope
    return slope


def goals(run: Run) -> str:
    """One row a goal: what was asked, what was measured, met or missed by how much."""
    rows = []
    for goal in GOALS:
        figure = goal.measure(run)
        value = "–" if figure is None else ratio(figure.ratio, figure.doubt)
        rows.append((goal.text, f"≤ {goal.limit:.2f}", value, goal.verdict(figure)))
    return table((f"ratio, {run.label}", "goal", "median [quartiles]", ""), rows)


def machine_line(run: Run) -> str:
    """Device, threads, versions, load, commit."""
    m = run.machine
    loads = [value for result in run.results for value in result.load]
    load = f"load {quartiles(loads).median:.1f} (highest {max(loads):.1f})" if loads else "load unknown"
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    return (
        f"{run.label}: {m['device']}; {m['cores']} cores, {m['threads']} thread(s), {m['system']}, {load}; "
        f"Python {m['python']}, {versions}; commit {run.commit}, {run.date}"
    )
