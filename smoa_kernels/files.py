"""Files that smoa-kernels writes: where its cache is, and how a file is replaced so that nobody sees half of it."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from .checks import check_kind

__all__ = ["cache_folder", "replace_file"]


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


def replace_file(path: Path, data: bytes) -> None:
    """Write beside the file, to the disk, then rename over it: what is there is the old file or the new one.

    Args:
        path: in a folder that exists.
        data: all of its content.

    Raises:
        TypeError: no path, no bytes.
        OSError: it cannot be written, naming `path`; nothing is left beside it.

    Example:
        >>> replace_file(Path("table.json"), b"{}")
        >>> Path("table.json").read_bytes()
        b'{}'
    """
    check_kind("path", path, Path)
    check_kind("data", data, bytes)
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
    except OSError as error:  # a full disk's names no file, others the one beside it
        raise OSError(error.errno, error.strerror, str(path)) from error
