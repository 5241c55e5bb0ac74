"""The typer application: commands, and errors as one line on stderr."""

from __future__ import annotations

import sys

import typer

from .audit import audit
from .info import info
from .inspect import inspect
from .roofline import roofline
from .tune import tune

__all__ = ["run"]

app = typer.Typer(
    name="smoa-kernels",
    help="Kernels for SMoA: what they would cost, what they compile to, where they run, how to tune them; adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(info)
app.command()(roofline)
app.command()(audit)
app.command()(inspect)
app.command()(tune)


def run(arguments: list[str]) -> int:
    """Run one command; its exit code."""
    try:
        code = app(arguments, prog_name="smoa-kernels", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130)
    except typer.Exit as stop:
        return stop.exit_code
    except (ValueError, OSError) as error:
        return _fail(str(error))
    except Exception as error:  # usage errors are click's, which typer bundles under a private name
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            return 2
        return _fail(error.format_message())
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int = 2) -> int:
    print(f"smoa-kernels: error: {' '.join(message.split())}", file=sys.stderr)
    return code
