"""Parsers of numbers on the command line whose complaints name the value and what is allowed."""

import math

import typer


def count(text: str) -> int:
    """Parse a whole number of at least 1."""
    return _whole_number(text, 1)


def natural(text: str) -> int:
    """Parse a whole number of at least 0."""
    return _whole_number(text, 0)


def _whole_number(text: str, smallest: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = smallest - 1
    if number < smallest:
        raise typer.BadParameter(f"{text!r} is not a whole number of at least {smallest}")
    return number


def positive(text: str) -> float:
    """Parse a finite number above 0."""
    number = _number(text)
    if not 0 < number < math.inf:
        raise typer.BadParameter(f"{text!r} is not a finite number above 0")
    return number


def probability(text: str) -> float:
    """Parse a number of at least 0 and below 1."""
    number = _number(text)
    if not 0 <= number < 1:
        raise typer.BadParameter(f"{text!r} is not a number of at least 0 and below 1")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan  # which no range contains
