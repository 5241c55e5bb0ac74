"""Runs as they are kept: one JSON object a line, appended under a lock, so that a run which is there is skipped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..machine import commit, describe


@dataclass(frozen=True)
class Key:
    """What a run is: two runs with one key are the same run.

    Names are labels. What they stand for is here too, so that a run is made anew where that has changed.
    """

    task: str
    method: str
    stage: str  # "search": judged on validation; "final": judged on test
    lr: float
    seed: int
    steps: int
    batch_size: int
    layers: int
    dtype: str
    data: str  # the questions' digest
    head_lr: float
    r: int
    num_blocks: int
    random: bool
    scaling: float = 1.0  # as it was before records said so
    modules: str = "all"  # likewise
    block_order: str = "spectral"  # likewise
    granule: int = 1  # likewise


# Which fields of a key are the same in all runs of a task, and which in all of a method's in it.
OF_A_TASK = ("steps", "batch_size", "layers", "dtype", "data", "head_lr")
OF_A_METHOD = ("r", "num_blocks", "random", "scaling", "modules", "block_order", "granule")


def read(path: Path) -> list[dict[str, Any]]:
    """Read the records. A line that was cut short by a crash is passed over."""
    return list(_lines(path)) if path.exists() else []


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def key_of(record: dict[str, Any]) -> Key:
    """Return which run a record is of."""
    given = (field for field in fields(Key) if field.default is MISSING or field.name in record)
    return Key(**{field.name: record[field.name] for field in given})


def check_one_setting(records: Iterable[dict[str, Any]]) -> None:
    """Refuse records of which some were made with other questions, or with another method of the same name.

    Raises:
        ValueError: naming the task or the method, and what differs.
    """
    found: dict[tuple[str, str], Any] = {}
    for key in map(key_of, records):
        for owner, names in ((key.task, OF_A_TASK), (f"{key.method} on {key.task}", OF_A_METHOD)):
            for name in names:
                value = getattr(key, name)
                first = found.setdefault((owner, name), value)
                if value != first:
                    raise ValueError(
                        f"runs of {owner} have {name} {first!r} and {value!r}: a report is of one setting, so the "
                        "records of the other must go to a file of their own"
                    )


def append(path: Path, key: Key, result: dict[str, Any]) -> dict[str, Any]:
    """Add a run, whole or not at all, and return its record. Several processes may append to one file."""
    record = asdict(key) | result
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"), path.open("a+b") as file:
        if file.tell() and not _ends_a_line(file):
            file.write(b"\n")  # after what a crash left
        file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return record


def _ends_a_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def provenance() -> dict[str, Any]:
    """The commit and the machine that a run was made with."""
    machine = describe(smoke=False)
    return {
        "commit": commit(),
        "machine": {name: machine[name] for name in ("device", "threads", "python", "versions")},
    }
