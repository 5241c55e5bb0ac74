"""Writes results to the terminal, a pipe, or a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PIPE_WIDTH = 160


def console() -> Console:
    """Standard output. If it is not a terminal it is wide enough for every column."""
    out = Console()
    return out if out.is_terminal else Console(width=_PIPE_WIDTH)


@contextmanager
def progress_of(doing: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, drawn by a callback that takes the number done and the total; none if it is not a terminal."""
    errors = Console(stderr=True)
    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def write_json(path: Path, data: Any) -> None:
    """Write JSON to a file, a pipe or a device; a ValueError says why if that cannot be."""
    try:
        path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error
