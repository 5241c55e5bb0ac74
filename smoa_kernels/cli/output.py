"""Where results go: the terminal, a pipe, or a JSON file."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

__all__ = ["console", "write_json"]

_PIPE_WIDTH = 160


def console() -> Console:
    """Standard output; wide enough for every column where it is not a terminal."""
    out = Console()
    return out if out.is_terminal else Console(width=_PIPE_WIDTH)


def write_json(path: Path, data: Any) -> None:
    """Write by rename: the file is the old one or the new one, never half of either.

    Raises:
        ValueError: the file cannot be written, and why.
    """
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: {path.parent} is not a folder")
    try:
        _replace(path, data)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error


def _replace(path: Path, data: Any) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(data, stream, indent=1, ensure_ascii=False)
            stream.write("\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
