"""``python -m benchmarks.quality run | report``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from questions import Splits
from rich.console import Console

from . import data
from .methods import BY_NAME, LADDER, LEARNING_RATES, SWEEPS
from .report import generate
from .study import Slice
from .tasks import TASKS, Task

RESULTS = Path(__file__).resolve().parents[1] / "results"
RECORDS = RESULTS / "quality.jsonl"
SMOKE_QUESTIONS = 40

app = typer.Typer(add_completion=False, help=__doc__)
console = Console(highlight=False)
Records = Annotated[Path, typer.Option(help="The runs, one JSON object a line.")]


@app.command()
def run(
    task: Annotated[list[str], typer.Option(help=f"One of {', '.join(TASKS)}; may be given several times.")],
    seeds: Annotated[int, typer.Option(min=1, help="Runs on test of each method.")] = 5,
    method: Annotated[
        list[str] | None, typer.Option(help="Only these, in this order; the whole sweep when left out.")
    ] = None,
    sweep: Annotated[str, typer.Option(help=f"What is varied, one of {', '.join(SWEEPS)}.")] = "methods",
    rate: Annotated[
        list[float] | None,
        typer.Option(
            help="Learning rates to begin with; the whole grid when left out. The search goes on from them."
        ),
    ] = None,
    records: Records = RECORDS,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Two steps on a few questions: does every method run.")
    ] = False,
) -> None:
    """Do the runs of these tasks that are not yet in the records."""
    _check("--task", task, TASKS)
    _check("--method", method or [], BY_NAME)
    _check("--sweep", [sweep], SWEEPS)
    _check("--rate", rate or [], LADDER)
    if smoke and records.resolve() == RECORDS:
        raise typer.BadParameter(f"--smoke: its figures mean nothing, so --records must not be {RECORDS}")
    torch.set_num_threads(1)
    chosen = [BY_NAME[name] for name in method] if method else SWEEPS[sweep]
    for name in task:
        try:
            if smoke:
                part = smoke_slice(TASKS[name], records)
            else:
                part = Slice(TASKS[name], records, console.print, rates=rate or LEARNING_RATES)
        except FileNotFoundError as error:
            raise typer.BadParameter(str(error)) from error
        part.run(seeds, chosen)


def smoke_slice(task: Task, records: Path) -> Slice:
    """A task in seconds."""
    splits = Splits(*(part[:SMOKE_QUESTIONS] for part in data.prepare(task.read(), task.held_out)))
    short = replace(task, steps=2, batch_size=4)
    return Slice(short, records, console.print, splits, LEARNING_RATES[:1], further=False)


@app.command()
def report(records: Records = RECORDS, out: Annotated[Path, typer.Option(help="Folder.")] = RESULTS) -> None:
    """Write quality.md and its figures."""
    if not records.is_file():
        raise typer.BadParameter(f"--records {records} is not there yet: `run` makes it")
    for path in generate(records, out):
        console.print(f"wrote {path}")


def _check(option: str, given: Iterable[object], allowed: Iterable[object]) -> None:
    for value in given:
        if value not in allowed:
            raise typer.BadParameter(f"{option} {value!r} is none of {', '.join(map(str, allowed))}")


if __name__ == "__main__":
    app()
