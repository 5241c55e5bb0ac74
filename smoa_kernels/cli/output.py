"""Where results go: the terminal, a pipe, or a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from ..files import replace_file

__all__ = ["check_place", "console", "write_bytes", "write_json"]

_PIPE_WIDTH = 160


def console() -> Console:
    """Standard output; wide enough for every column where it is not a terminal."""
    out = Console()
    return out if out.is_terminal else Console(width=_PIPE_WIDTH)


def write_json(path: Path, data: Any) -> None:
    """Write as :func:`write_bytes` does.

    Raises:
        ValueError: the file cannot be written, and why.
    """
    write_bytes(path, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write by rename: the file is the old one or the new one, never half of either.

    What is no plain file, a pipe or /dev/stdout, is written to and stays what it is.

    Raises:
        ValueError: the file cannot be written, and why.
    """
    check_place(path)
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            path.write_bytes(data)
        else:
            replace_file(path, data)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error


def check_place(path: Path) -> None:
    """Whether there is a folder for a file, and no folder in its place; for what is computed a while before.

    Raises:
        ValueError: naming the path.
    """
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: {path.parent} is not a folder")
    if path.is_dir():
        raise ValueError(f"cannot write {path}: Is a directory")
