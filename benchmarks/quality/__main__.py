"""``python -m benchmarks.quality run | report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from .methods import BY_NAME, METHODS
from .study import Slice
from .tasks import TASKS

RESULTS = Path(__file__).resolve().parents[1] / "results"
RECORDS = RESULTS / "quality.jsonl"

app = typer.Typer(add_completion=False, help=__doc__)
console = Console(highlight=False)
Records = Annotated[Path, typer.Option(help="The runs, one JSON object a line.")]


@app.command()
def run(
    task: Annotated[list[str], typer.Option(help=f"One of {', '.join(TASKS)}; may be given several times.")],
    seeds: Annotated[int, typer.Option(min=1, help="Runs on test of each method.")] = 5,
    method: Annotated[list[str] | None, typer.Option(help="Only these; all when left out.")] = None,
    records: Records = RECORDS,
) -> None:
    """Do the runs of these tasks that are not yet in the records."""
    _check("--task", task, TASKS)
    _check("--method", method or [], BY_NAME)
    torch.set_num_threads(1)
    for name in task:
        chosen = [m for m in METHODS if not method or m.name in method]
        Slice(TASKS[name], records, console.print).run(seeds, chosen)


@app.command()
def report(records: Records = RECORDS, out: Annotated[Path, typer.Option(help="Folder.")] = RESULTS) -> None:
    """Write quality.md and its figures."""
    from .report import generate

    for path in generate(records, out):
        console.print(f"wrote {path}")


def _check(option: str, given: list[str], allowed: object) -> None:
    for value in given:
        if value not in list(allowed):  # type: ignore[call-overload]
            raise typer.BadParameter(f"{option} {value!r} is none of {', '.join(allowed)}")  # type: ignore[arg-type]


if __name__ == "__main__":
    app()
