"""Keep what `make finetune` measured, and write the README's table of it.

    python -m benchmarks.main_job runs/finetune-lora runs/finetune-hira runs/finetune-smoa   # keeps, then writes
    python -m benchmarks.main_job                                              # writes from what is kept

`make main-job` runs the three one after the other and calls this.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .machine import commit
from .readme import README, Section
from .results import write
from .tables import table

KEPT = Path(__file__).resolve().parent / "results" / "main-job"
METHODS = {"lora": "PEFT LoRA", "hira": "PEFT HiRA", "smoa": "**SMoA, K=2**"}
SECTION = Section("benchmarks/main_job.py")


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
    text = json.dumps({"commit": commit(), "summary": summary}, ensure_ascii=False, indent=1)
    KEPT.mkdir(exist_ok=True)
    write(KEPT / f"{options['method']}.json", text + "\n")


def section() -> str:
    """The README's paragraph and table of the runs that are kept."""
    records = {name: json.loads((KEPT / f"{name}.json").read_text(encoding="utf-8")) for name in METHODS}
    commits = {record["commit"] for record in records.values()}
    summaries = {name: record["summary"] for name, record in records.items()}
    smoa = summaries["smoa"]
    machine, options = smoa["machine"], smoa["options"]
    rates = ", ".join(
        f"{METHODS[name].strip('*')} {one['learning_rate']:g}" for name, one in summaries.items()
    )
    lines = [
        f"**The main job, {machine['label']}** ({machine['cpu']}, {machine['threads']} threads, "
        f"{options['dtype']}, seed {options['seed']}, commit {', '.join(sorted(commits))}; `make main-job`, one run "
        f"of each after the other). Learning rates, chosen among four each on the validation split: {rates}.",
        table(
            [
                f"SmolLM2-135M (dequantised Q4_1) on TREC, {options['steps']} steps of {options['batch_size']}, "
                f"r={options['r']}",
                "trained parameters",
                f"accuracy on {smoa['accuracy_after']['questions']} test questions",
                "seconds per step, median",
                "peak memory",
            ],
            [
                ["before", "", _accuracy(smoa["accuracy_before"]), "", ""],
                *(_row(METHODS[name], summary) for name, summary in summaries.items()),
            ],
        ),
    ]
    return "\n\n".join(line.strip() for line in lines)


def _row(name: str, summary: dict[str, Any]) -> list[str]:
    return [
        name,
        f"{summary['trainable_parameters']:,}",
        _accuracy(summary["accuracy_after"]),
        f"{summary['median_step_seconds']:.2f}",
        f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB",
    ]


def _accuracy(found: dict[str, float]) -> str:
    return f"{100 * found['accuracy']:.1f} % ± {100 * found['standard_error']:.1f}"


def main(
    runs: Annotated[list[Path] | None, typer.Argument(help="Folders of finished runs to keep.")] = None,
) -> None:
    """Keep runs of the main job and write the README's table anew."""
    for run in runs or []:
        keep(run)
    write(README, SECTION.replace(README.read_text(encoding="utf-8"), section()))
    print(f"written: {README}")


if __name__ == "__main__":
    typer.run(main)
