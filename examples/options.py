"""The command line of the examples: numbers whose complaints name the value and what is allowed, errors of one line."""

import math
import sys

import typer


def run_command(app: typer.Typer, arguments: list[str] | None, interrupted: str = "interrupted") -> int:
    """Run an example and return its exit code; bad input, a missing file and Ctrl-C are one line on stderr."""
    try:
        return app(arguments, standalone_mode=False) or 0
    except typer.TyperException as error:
        message, code = error.format_message(), error.exit_code
    except OSError as error:
        message, code = str(error), 1
    except KeyboardInterrupt:
        message, code = interrupted, 130
    print("error:", *message.split(), file=sys.stderr)
    return code


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
