"""The typer application: its commands, and errors as one line on stderr."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated

import typer

from .audit import audit
from .convert import convert
from .info import info
from .inspect import inspect
from .merge import merge
from .plan import plan
from .roofline import roofline
from .spectrum import spectrum
from .tune import tune

__all__ = ["run"]

app = typer.Typer(
    name="smoa-kernels",
    help="SMoA's kernels: where they run, what they cost, what they compile to, how to tune them. And its adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(info)
app.command()(roofline)
app.command()(plan)
app.command()(audit)
app.command()(inspect)
app.command()(convert)
app.command()(merge)
app.command()(spectrum)
app.command()(tune)


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show an error's traceback too.")] = False,
) -> None:
    context.obj["debug"] = debug


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code. An error is one line on stderr; `--debug` shows its traceback first."""
    options = {"debug": False}
    try:
        code = app(arguments, prog_name="smoa-kernels", standalone_mode=False, obj=options)
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130)
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(_message(error))
            return 2
        if options["debug"]:
            traceback.print_exception(error)
        return _fail(_message(error))
    return code if isinstance(code, int) else 0


def _message(error: Exception) -> str:
    if hasattr(error, "format_message"):  # a usage error of click, whose classes typer keeps private
        return str(error.format_message())
    if isinstance(error, (ValueError, OSError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error} (unexpected; smoa-kernels --debug shows where)"


def _fail(message: str, code: int = 2) -> int:
    print(f"smoa-kernels: error: {' '.join(message.split())}", file=sys.stderr)
    return code
