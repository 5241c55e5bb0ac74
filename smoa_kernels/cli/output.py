"""Writes results to the terminal, a pipe, or a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..files import replace_file

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
    """Write JSON: replace a file atomically; write directly to a pipe or device such as /dev/stdout.

    Raises:
        ValueError: the file cannot be written; the message says why.
    """
    text = (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            path.write_bytes(text)
        else:
            replace_file(path, text)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error
