"""`naming`: says in an error what it is about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["naming"]


@contextmanager
def naming(what: str | Path) -> Iterator[None]:
    """Begin the message of a TypeError or ValueError of the block with its layer, or with its file if it names none."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if isinstance(what, Path) and str(what) in str(error):
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{what}: {error}") from error
