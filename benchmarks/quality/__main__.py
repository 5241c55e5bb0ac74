"""``python -m benchmarks.quality run | forgetting | report``."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import typer

from ..machine import EDITED, commit
from ..results import RESULTS
from . import fronts
from .forgetting import JOBS, RATES, Forgetting
from .methods import BY_NAME, LADDER, LEARNING_RATES, SWEEPS
from .report import generate
from .study import run_share
from .tasks import TASKS

RECORDS = RESULTS / "quality.jsonl"
FORGETTING = RESULTS / "forgetting.jsonl"

app = typer.Typer(add_completion=False, help=__doc__)
Records = Annotated[Path, typer.Option(help="The runs, one JSON object a line.")]


@app.command()
def run(
    task: Annotated[list[str], typer.Option(help=f"Of {', '.join(TASKS)}; may be given several times.")],
    seeds: Annotated[int, typer.Option(min=1, help="Runs on test of each method.")] = 5,
    method: Annotated[
        list[str] | None, typer.Option(help="Only these, in this order; the whole sweep when left out.")
    ] = None,
    sweep: Annotated[str, typer.Option(help=f"What is varied, one of {', '.join(SWEEPS)}.")] = "methods",
    rate: Annotated[
        list[float] | None,
        typer.Option(help="Learning rates to begin with; the search goes on from them along the ladder."),
    ] = None,
    records: Records = RECORDS,
    allow_dirty: Annotated[
        bool, typer.Option("--allow-dirty", help="Run although code is not committed; the records say so.")
    ] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Two steps on a few questions: does every method run.")
    ] = False,
) -> None:
    """Do the runs of these tasks that are not yet in the records; those that are done outlive Ctrl-C and kills.

    Processes of one thread, one a core, share the methods.
    """
    for option, given, allowed in (
        ("--task", task, tuple(TASKS)),
        ("--method", method or [], tuple(BY_NAME)),
        ("--sweep", [sweep], tuple(SWEEPS)),
        ("--rate", rate or [], LADDER),
    ):
        for value in given:
            if value not in allowed:
                raise typer.BadParameter(f"{option} {value!r} is none of {', '.join(map(str, allowed))}")
    if smoke and records.resolve() == RECORDS:
        raise typer.BadParameter(f"--smoke: its figures mean nothing, so --records must not be {RECORDS}")
    if not (smoke or allow_dirty) and commit().endswith(EDITED):
        raise typer.BadParameter(
            "code is not committed, so nobody could repeat these runs: commit it, or --allow-dirty"
        )
    chosen = method or [m.name for m in SWEEPS[sweep]]
    jobs = min(os.cpu_count() or 1, len(chosen))
    shares = [chosen[k::jobs] for k in range(jobs)]
    for name in task:
        do = partial(run_share, name, records, smoke, rate or LEARNING_RATES, seeds)
        with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
            list(pool.map(do, shares))


@app.command()
def forgetting(
    job: Annotated[str, typer.Option(help=f"Of {', '.join(JOBS)}.")] = next(iter(JOBS)),
    seed: Annotated[list[int] | None, typer.Option(min=0, help="May be given several times.")] = None,
    methods: Annotated[int, typer.Option(min=1, help="Only the first so many.")] = max(
        map(len, RATES.values())
    ),
    rate: Annotated[list[float] | None, typer.Option(help="Only these of the learning rates.")] = None,
    records: Records = FORGETTING,
    smoke: Annotated[bool, typer.Option("--smoke", help="Two steps, a few questions and words.")] = False,
) -> None:
    """Do the runs of these seeds that are not yet in the records; write forgetting.md and its figure beside them.

    Processes of different seeds may share the records.
    """
    if job not in JOBS:
        raise typer.BadParameter(f"--job {job!r} is none of {', '.join(JOBS)}")
    Forgetting(records, job, smoke).run(seed or (), methods, rate or ())
    for path in fronts.generate(records, records.parent):
        print(f"wrote {path}")


@app.command()
def report(records: Records = RECORDS, out: Annotated[Path, typer.Option(help="Folder.")] = RESULTS) -> None:
    """Write quality.md and its figures."""
    if not records.is_file():
        raise typer.BadParameter(f"--records {records} is not there yet: `run` makes it")
    for path in generate(records, out):
        print(f"wrote {path}")


if __name__ == "__main__":
    app()
