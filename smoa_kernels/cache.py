"""Where smoa-kernels keeps what it found out: tuned tables, compiled records."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """`$SMOA_CACHE`, else `$XDG_CACHE_HOME/smoa-kernels`, else `~/.cache/smoa-kernels`; made by whoever writes.

    Example:
        >>> cache_folder() == Path(os.environ["SMOA_CACHE"])
        True
    """
    if own := os.environ.get("SMOA_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "smoa-kernels"
