"""What a value must be: a kind of thing, a count, a number, one of a few names. Each error says what was given."""

from __future__ import annotations

import os
from collections.abc import Collection

__all__ = ["check_choice", "check_count", "check_kind", "check_names", "check_number", "check_path"]


def check_choice(name: str, value: str, allowed: Collection[str]) -> None:
    """Whether `value` is one of the names that are allowed."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_count(name: str, value: int, least: int, most: int | None = None) -> None:
    """Whether `value` is an int within these bounds; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")


def check_kind(name: str, value: object, kind: type) -> None:
    """Whether `value` is an instance of `kind`."""
    if not isinstance(value, kind):
        wanted = f"torch.{kind.__name__}" if kind.__module__ == "torch" else kind.__name__
        article = "an" if wanted[0] in "AEIOU" else "a"
        raise TypeError(f"{name} must be {article} {wanted}, got {type(value).__name__}")


def check_names(name: str, value: object) -> None:
    """Whether `value` is a list of strings, and no string, which would be a list of its letters."""
    if not isinstance(value, (list, tuple, set)) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{name} must be a list of names, got {value!r}")


def check_number(name: str, value: float) -> None:
    """Whether `value` is a real number that torch takes as a scalar; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if isinstance(value, int) and value.bit_length() > 63:
        raise ValueError(
            f"{name} must be a float, or an int of at most 63 bits, got {value.bit_length()} bits"
        )


def check_path(name: str, value: object) -> None:
    """Whether `value` can be the path of a file or folder."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path, got {value!r}")
