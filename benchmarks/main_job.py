"""Keep what `make finetune` measured, and write the README's table of it.

    python -m benchmarks.main_job runs/finetune-lora runs/finetune-hira runs/finetune-smoa   # keeps, then writes
    python -m benchmarks.main_job                                              # writes from what is kept

`make main-job` runs the three one after the other and calls this.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .machine import commit, cpu_name
from .readme import MAIN_JOB, README, write_readme
from .results import write


def keep(run: Path) -> None:
    """Copy a finished run's summary to the results.

    Raises:
        ValueError: the run is not finished, or not at the command's defaults.
    """
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    if summary["status"] != "complete":
        raise ValueError(f"{run}: its status is {summary['status']!r}, not 'complete'")
    options = summary["options"]
    chosen = {name: options[name] for name in ("model", "data", "lr", "alpha", "num_blocks", "distributed")}
    if any(value is not None for value in chosen.values()) or options["eval_split"] != "test":
        raise ValueError(f"{run}: not run as `make finetune` runs it: {options}")
    kept = {"commit": commit(), "processor": cpu_name(), "summary": summary}
    text = json.dumps(kept, ensure_ascii=False, indent=1)
    MAIN_JOB.mkdir(exist_ok=True)
    write(MAIN_JOB / f"{options['method']}.json", text + "\n")


def main(
    runs: Annotated[list[Path] | None, typer.Argument(help="Folders of finished runs to keep.")] = None,
) -> None:
    """Keep runs of the main job and write the README's table."""
    for run in runs or []:
        keep(run)
    write_readme()
    print(f"written: {README}")


if __name__ == "__main__":
    typer.run(main)
