"""The report's tables, in Markdown: a row a result, or a row a provider of a result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .goals import GOALS
from .protocol import Figure
from .providers import PAPER
from .results import Result, Run

MIB = 2**20
# Full names for headings.
NAMES = {PAPER: "the paper's dense way"}
COUNTED = {
    "saved": "saved for backward",
    "forward_workspace": "workspace, forward",
    "backward_workspace": "workspace, backward",
    "files": "on disk",
}


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; "" without rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if not lines:
        return ""
    head = f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}\n"
    return head + "\n".join(lines) + "\n"


def paragraphs(*parts: str) -> str:
    """A page's text: its parts with blank lines between them; empty ones are left out."""
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def shown(figure: Figure | None) -> str:
    """A figure as a cell."""
    return "–" if figure is None else str(figure)


def mib(size: int) -> str:
    """Bytes as a cell."""
    return f"{size / MIB:.{1 if size > MIB else 2}f}"


def case_name(result: Result) -> str:
    """A result's case in words."""
    p = result.params
    if "tokens" not in p or "out_features" not in p:
        return result.title.partition(": ")[2]
    shape = f"{p['out_features']}×{p['in_features']}"
    dropout = f", dropout {p['dropout']}" if p["dropout"] else ""
    return f"T={p['tokens']}, {shape}, r={p['rank']}, K={p['num_blocks']}, {p['dtype']}{dropout}"


def ratios(
    run: Run,
    results: Sequence[Result],
    phase: str,
    names: Sequence[str] | None = None,
    over: str | None = None,
) -> str:
    """One row a case: the baseline's milliseconds and spread, then each provider's ratio to it, or to `over`."""
    if names is None:
        every = dict.fromkeys(name for r in results for name in r.seconds[phase])
        names = [name for name in every if name not in (over or results[0].baseline, results[0].baseline)]
    rows = []
    for result in results:
        c = result.comparison(phase)
        base = f"{Figure.of(c.seconds[c.baseline]).median * 1e3:.3g} ms, {c.spread:.0%}"
        rows.append((case_name(result), base, *(shown(c.ratio(name, over)) for name in names)))
    words, baseline = "forward + backward" if phase == "both" else phase, results[0].baseline
    heading = f"{words}, × {over or baseline}, {run.label}"
    return table((heading, f"{baseline}, spread", *(NAMES.get(n, n) for n in names)), rows)


def counted(run: Run, results: Sequence[Result]) -> str:
    """One row a case and provider: memory or file size, in MiB."""
    kinds = dict.fromkeys(kind for r in results for sizes in r.bytes.values() for kind in sizes)
    rows = [
        (case_name(result), NAMES.get(name, name), *(mib(sizes[kind]) for kind in kinds))
        for result in results
        for name, sizes in result.bytes.items()
    ]
    return table((f"MiB, {run.label}", "", *(COUNTED.get(kind, kind) for kind in kinds)), rows)


def goals(run: Run) -> str:
    """One row per goal: the limit, the measurement, and met or missed by how much."""
    rows = []
    for goal in GOALS:
        found = goal.measure(run)
        cells = (str(found[0]), goal.verdict(*found)) if found else ("–", "not measured")
        rows.append((goal.text, f"≤ {goal.limit:.2f}", *cells))
    return table((f"ratio, {run.label}", "goal", "median [quartiles]", ""), rows)


def machine_line(run: Run) -> str:
    """Device, threads, versions, load, commit."""
    m = run.machine
    loads = [value for result in run.results for value in result.load]
    load = f"load {Figure.of(loads).median:.1f} (highest {max(loads):.1f})" if loads else "load unknown"
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    return (
        f"{run.label}: {m['device']}; {m['cores']} cores, {m['threads']} thread(s), {m['system']}, {load}; "
        f"Python {m['python']}, {versions}; commit {run.commit}, {run.date}"
    )
