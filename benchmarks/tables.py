"""The report's tables, in Markdown: a row a result, or a row a provider of a result."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from .cases import ONE_BILLION
from .goals import GOALS
from .protocol import quartiles
from .providers import FROZEN, LORA, PAPER, SMOA
from .results import Figure, Result, Run

MIB = 2**20
NAMES = {PAPER: "the paper's dense way"}  # full names for headings


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; "" without rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if not lines:
        return ""
    head = f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}\n"
    return head + "\n".join(lines) + "\n"


def shown(figure: Figure | None) -> str:
    """A figure as a cell."""
    return "–" if figure is None else str(figure)


def mib(size: int, digits: int = 1) -> str:
    """Bytes as a cell."""
    return f"{size / MIB:.{digits}f}"


def case_name(result: Result) -> str:
    """A layer's problem in words."""
    p = result.params
    shape = f"{p['out_features']}×{p['in_features']}"
    dropout = f", dropout {p['dropout']}" if p["dropout"] else ""
    return f"T={p['tokens']}, {shape}, r={p['rank']}, K={p['num_blocks']}, {p['dtype']}{dropout}"


def ratios(run: Run, results: Sequence[Result], phase: str, names: Sequence[str] | None = None) -> str:
    """One row a case of a run: the baseline's milliseconds and spread, then each provider's ratio to it."""
    if names is None:
        every = dict.fromkeys(name for r in results for name in r.seconds[phase] if name != r.baseline)
        names = list(every)
    rows = []
    for result in results:
        c = result.comparison(phase)
        base = f"{c.time(c.baseline).median * 1e3:.3g} ms, {c.spread:.0%}"
        rows.append((case_name(result), base, *(shown(result.ratio(phase, name)) for name in names)))
    words = "forward + backward" if phase == "both" else phase
    headings = (f"{words} over frozen, {run.label}", "frozen, spread", *(NAMES.get(n, n) for n in names))
    return table(headings, rows)


def memory(run: Run) -> str:
    """One row a case and provider, in MiB."""
    kinds = ("saved", "peak", "forward_workspace", "backward_workspace")
    rows = [
        (case_name(result), NAMES.get(name, name), *(mib(sizes[kind]) for kind in kinds))
        for result in run.select("memory")
        for name, sizes in result.bytes.items()
    ]
    counted = ("saved for backward", "peak", "workspace, forward", "workspace, backward")
    return table((f"MiB, {run.label}", "", *counted), rows)


def experts(run: Run) -> str:
    """One row a layer of experts and provider: over frozen, over PEFT's LoRA, and the peak beside frozen's."""
    rows = []
    for kind, phase in (("experts", "both"), ("experts, one token", "forward")):
        for result in run.select(kind):
            p = result.params
            pairs = f"{p['pairs']} pairs an expert" if p["pairs"] else "one token, forward"
            case = f"{pairs}, E={p['experts']}, H={p['hidden']}, I={p['intermediate']}, {p['dtype']}"
            for name in result.seconds[phase]:
                peak = mib(result.bytes[name]["peak"]) if result.bytes else "–"
                over = (shown(result.ratio(phase, name, other)) for other in (None, LORA))
                rows.append((case, name, *over, peak))
    return table((run.label, "", "over frozen", "over PEFT LoRA", "peak, MiB"), rows)


def steps(run: Run) -> str:
    """One row a method: seconds, tokens per second, over LoRA, and the peak above model and optimizer."""
    rows = []
    for result in run.select("step"):
        p, c = result.params, result.comparison("step")
        factors = ", factors too" if "factors" in p else ""
        case = f"{p['model']}, {p['dtype']}{factors}, {p['batch']} × {p['length']} tokens"
        for name in c.seconds:
            seconds = c.time(name).median
            method = f"{name}, K={p['num_blocks']}" if name == SMOA else name
            speed = (f"{seconds:.3g}", f"{p['batch'] * p['length'] / seconds:.0f}")
            rows.append(
                (case, method, *speed, shown(result.ratio("step", name)), mib(result.bytes[name]["peak"], 0))
            )
    return table((run.label, "", "s / step", "tokens / s", "over PEFT LoRA", "peak, MiB"), rows)


def partitions(run: Run) -> str:
    """One row a shape; the last one is a whole model, extrapolated from its distinct shapes."""
    rows = []
    for result in run.select("partition"):
        c = result.comparison("partition")
        seconds = (f"{c.time(name).median:.3g}" for name in ("SVD", "partition"))
        shape = f"{result.params['out_features']}×{result.params['in_features']}"
        rounds = str(len(c.seconds["SVD"]))
        rows.append((shape, *seconds, shown(result.ratio("partition", "partition")), rounds))
    svd, ours = (one_billion(run, name) for name in ("SVD", "partition"))
    if svd is not None and ours is not None:
        name = f"all {sum(ONE_BILLION.values())} layers of Llama-3.2-1B's shape, extrapolated"
        rows.append((name, f"{svd:.0f}", f"{ours:.0f}", f"{ours / svd:.2f}", "–"))
    return table((run.label, "SVD, s", "partition, s", "partition over SVD", "rounds"), rows)


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
            figures = (result.time(phase, name) for phase in ("inject", "save", "load"))
            rows.append((name, *(f.short(".3g") if f else "–" for f in figures), mib(sizes["files"], 2)))
    return table((run.label, "inject, s", "save, s", "load, s", "on disk, MiB"), rows)


def scaling(run: Run) -> str:
    """Log-log slopes of the time, and of the time beyond frozen's."""
    rows = []
    for result in run.select("scaling"):
        values, c = result.params["values"], result.comparison("both")
        axis = f"{result.params['axis']}, {values[0]} to {values[-1]}"
        axis += f", {c.doubt}, not judged" if c.doubt else ""
        for name in (FROZEN, LORA, SMOA):
            time = log_log_slope(values, [c.time(f"{name} @ {v}").median for v in values])
            added = [c.added(f"{name} @ {v}", f"{FROZEN} @ {v}").median for v in values]
            rows.append(
                (axis, name, f"{time:+.2f}", f"{log_log_slope(values, added):+.2f}".replace("+nan", "–"))
            )
    return table((f"grows with, {run.label}", "", "time", "time over frozen's"), rows)


def log_log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of log y over log x: the power of x with which y grows; NaN where y is not positive."""
    if min(y) <= 0:
        return math.nan
    slope: float = statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope
    return slope


def goals(run: Run) -> str:
    """One row per goal: the limit, the measurement, and met or missed by how much."""
    rows = []
    for goal in GOALS:
        found = goal.measure(run)
        figure = found[0] if found else None
        rows.append((goal.text, f"≤ {goal.limit:.2f}", shown(figure), goal.verdict(run)))
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
