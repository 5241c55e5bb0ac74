"""Write the report of one or more runs: tables and goals in benchmarks/results, and the README's section.

    python -m benchmarks.report RUN.json …     # adds runs, then writes everything
    python -m benchmarks.report                # writes everything from the runs that are kept

A run is the JSON of `make bench` (pytest --benchmark-json), kept in a compact form under its device's name, or the
summary.json of `make finetune`, kept under its method's name. A new run replaces the old one.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Annotated

import typer

from . import protocol, tables
from .providers import LORA
from .readme import COLUMNS, README, keep_job, rows, section, with_section
from .results import RESULTS, Run, compact, read, read_all, write

SECTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("The layer", "layer", ("both", "forward", "backward")),
    ("A few tokens, forward", "few tokens", ("forward",)),
    ("Memory of one training pass of a layer", "memory", ()),
    ("A layer of experts", "experts", ("both",)),
    ("One token through experts, forward", "experts, one token", ("forward",)),
    ("A training step of a model", "step", ("step",)),
    ("Blocks from a weight's spectrum, over an SVD", "partition", ("partition",)),
    ("Adding an adapter to a model, saving and loading it", "adapter", ("inject", "save", "load")),
)
"""Heading, kind of result, phases."""
NONE_YET = "No run has been kept yet: `make bench` measures and writes what belongs here.\n"


def page(runs: list[Run]) -> str:
    """The text of results/README.md."""
    words = Path(__file__).with_name("page.md").read_text(encoding="utf-8")
    text = words.format(
        protocol=inspect.cleandoc(protocol.__doc__ or "").partition("\n\n")[2],
        summary=tables.table(
            ("SMoA / LoRA / HiRA", *COLUMNS),
            [cells for run in runs if not run.machine["smoke"] for cells in rows(run)],
        ),
        runs=tables.paragraphs(*map(_run_page, runs)) if runs else NONE_YET,
    )
    return tables.paragraphs(*text.split("\n\n"))


def main(
    runs: Annotated[list[Path] | None, typer.Argument(help="JSON files of runs to add.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of results.")] = RESULTS,
) -> None:
    """Add runs to a folder of results and write its tables; of the project's own results the README's section, too."""
    ours = out.resolve() == RESULTS
    for path in runs or []:
        data = json.loads(path.read_text(encoding="utf-8"))
        if "trainable_parameters" in data:
            keep_job(data)
            continue
        run = read(path)
        if ours and run.machine["smoke"]:
            raise typer.BadParameter("a --smoke run measures nothing: give another --out", param_hint="RUNS")
        write(out / f"{run.slug}.json", compact(run))
    kept = read_all(out)
    files = {out / "README.md": page(kept), out / "goals.md": goals(kept)}
    if ours:
        files[README] = with_section(README.read_text(encoding="utf-8"), section(kept))
    for path, text in files.items():
        write(path, text)
        print(f"written: {path}")


def _run_page(run: Run) -> str:
    timed = [result for result in run.results if result.seconds]
    doubtful = []
    for result in timed:
        if doubts := {p: doubt for p in result.seconds if (doubt := result.comparison(p).doubt)}:
            phases = "" if len(doubts) == len(result.seconds) else f", {' and '.join(doubts)}"
            doubtful.append(f"{result.title}{phases} ({next(iter(doubts.values()))})")
    steady = f"{len(timed) - len(doubtful)} of {len(timed)} comparisons are steady"
    if doubtful:
        steady += f"; the others are not to be quoted: {'; '.join(doubtful)}"
    if "suite_seconds" in run.machine:  # older runs lack it
        steady += f". The suite took {run.machine['suite_seconds']} s"
    blocks = [
        f"## {run.machine['device']}",
        "**A smoke run: tiny sizes, its figures mean nothing.**" if run.machine["smoke"] else "",
        '<details markdown="1"><summary>machine and tables</summary>',
        f"{tables.machine_line(run)}. {steady}.",
    ]
    for heading, kind, shown in SECTIONS:
        results = run.select(kind)
        blocks += [f"### {heading}", *(tables.ratios(run, results, phase) for phase in shown if results)]
        if kind == "experts" and results:
            blocks.append(tables.ratios(run, results, "both", over=LORA))
        blocks.append(tables.counted(run, results) if results else "Not measured in this run.")
    return tables.paragraphs(*blocks, "</details>")


def goals(runs: list[Run]) -> str:
    """The text of results/goals.md, for those who work on the code."""
    words = "Written by `python -m benchmarks.report` from `benchmarks/goals.csv`."
    parts = (f"## {run.machine['device']}\n\n{tables.goals(run)}" for run in runs if not run.on_gpu)
    return tables.paragraphs("# Goals of the layer on one CPU thread", words, *parts)


if __name__ == "__main__":
    typer.run(main)
