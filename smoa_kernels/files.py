"""The cache folder of smoa-kernels, and atomic replacement of files."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def cache_folder() -> Path:
    """Return `$SMOA_CACHE`, else `$XDG_CACHE_HOME/smoa-kernels`, else `~/.cache/smoa-kernels`; it may not exist yet."""
    if own := os.environ.get("SMOA_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "smoa-kernels"


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file: write a new one beside it, flush it to the disk, and rename it over the old one.

    Raises:
        OSError: the file cannot be written. The error names `path`; the old file and the folder are as before.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:  # it names no file if the disk is full, and else the temporary one
        raise OSError(error.errno, error.strerror, str(path)) from error
