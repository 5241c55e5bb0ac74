"""The stored runs: one JSON object per line, appended under a lock, so that a finished run is skipped."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..machine import commit, describe

# Two runs that agree in these fields are the same run. Names are labels; the settings that they stand for are here too,
# so that a run is repeated if they change. The first fields are the same in all runs of a task, the second in all runs
# of a method on a task.
OF_A_TASK = ("steps", "batch_size", "layers", "dtype", "data", "head_lr")
OF_A_METHOD = (
    *("r", "num_blocks", "random", "scaling", "kappa", "modules", "block_order", "granule"),
    *("bits", "group_size", "dropout", "weight_decay"),
)
KEY = ("task", "method", "stage", "lr", "seed", *OF_A_TASK, *OF_A_METHOD)
# Values for records from before these fields existed.
BEFORE = {"scaling": 1.0, "kappa": 0.0, "modules": "all", "block_order": "spectral", "granule": 1}
BEFORE |= {"bits": "", "group_size": 1, "dropout": 0.0, "weight_decay": 0.0}


def read(path: Path) -> list[dict[str, Any]]:
    """Read the records. A line that a crash cut short is skipped."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            records.append(BEFORE | json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def key_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that identify a record's run."""
    return {name: record[name] for name in KEY}


def check_one_setting(records: Iterable[dict[str, Any]]) -> None:
    """Refuse records if some were made with other questions, or with another method of the same name.

    Raises:
        ValueError: naming the task or the method, and what differs.
    """
    found: dict[tuple[str, str], Any] = {}
    for record in records:
        of_method = f"{record['method']} on {record['task']}"
        for owner, names in ((record["task"], OF_A_TASK), (of_method, OF_A_METHOD)):
            for name in names:
                first = found.setdefault((owner, name), record[name])
                if record[name] != first:
                    raise ValueError(
                        f"runs of {owner} have {name} {first!r} and {record[name]!r}: a report is of one setting, so "
                        "the records of the other must go to a file of their own"
                    )


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a run. Several processes may append to one file; a line that a crash left unfinished is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"), path.open("a+b") as file:
        file.seek(max(0, file.tell() - 1))
        cut_short = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * cut_short + json.dumps(record, ensure_ascii=False).encode() + b"\n")


def provenance() -> dict[str, Any]:
    """The commit and the machine that a run was made with."""
    machine = describe(smoke=False)
    return {
        "commit": commit(),
        "machine": {name: machine[name] for name in ("device", "threads", "python", "versions")},
    }
