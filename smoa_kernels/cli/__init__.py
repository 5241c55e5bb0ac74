"""The command line, `smoa-kernels`. typer and rich are an extra: `pip install smoa-kernels[cli]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `smoa-kernels` and return its exit code: 0, 1 for a finding, 2 for an error, 130 when interrupted.

    Example:
        >>> main(["tune", "--shape", "h999"])  # the error is one line on stderr
        2
    """
    try:
        from .app import run
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in ("typer", "rich"):
            raise
        print(
            f"smoa-kernels: error: {missing} is not installed; run: pip install 'smoa-kernels[cli]'",
            file=sys.stderr,
        )
        return 2
    return run(list(sys.argv[1:] if arguments is None else arguments))
