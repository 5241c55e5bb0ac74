"""`naming`: adds the name of a layer or file to an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["naming"]


@contextmanager
def naming(what: str | Path) -> Iterator[None]:
    """Put the name of a layer or file before the message of a TypeError or ValueError from the block.

    A wrong value in a file, given as a Path, is always a ValueError. A ValueError that begins with the name stays.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        if isinstance(error, ValueError) and str(error).startswith(str(what)):
            raise
        kind = TypeError if isinstance(error, TypeError) and not isinstance(what, Path) else ValueError
        raise kind(f"{what}: {error}") from error
