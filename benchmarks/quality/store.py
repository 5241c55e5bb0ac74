"""Runs as they are kept: one JSON object a line, appended under a lock, so that a run which is there is skipped."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..machine import describe


@dataclass(frozen=True)
class Key:
    """What a run is: two runs with one key are the same run."""

    task: str
    method: str
    stage: str  # "search": judged on validation; "final": judged on test
    lr: float
    seed: int
    steps: int
    batch_size: int
    layers: int
    dtype: str


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
    return Key(**{field.name: record[field.name] for field in fields(Key)})


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
        "commit": _commit(),
        "machine": {name: machine[name] for name in ("device", "threads", "python", "versions")},
    }


def _commit() -> str:
    here = Path(__file__).parent
    try:
        text = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=10"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return text
