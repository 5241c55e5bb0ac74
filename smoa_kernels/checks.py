"""What a value must be: a kind of thing, a count, a number, one of a few names. Each error says what was given."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["check_choice", "check_count", "check_kind", "check_number"]


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
        raise TypeError(f"{name} must be a {wanted}, got {type(value).__name__}")


def check_number(name: str, value: float) -> None:
    """Whether `value` is a real number that torch takes as a scalar; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if isinstance(value, int) and value.bit_length() > 63:
        raise ValueError(
            f"{name} must be a float, or an int of at most 63 bits, got {value.bit_length()} bits"
        )
