"""The typer application: its commands in groups, and errors as one line on stderr."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer

from .convert import convert
from .info import info
from .inspect import inspect
from .merge import merge
from .tune import tune

app = typer.Typer(
    name="smoa-kernels",
    help="SMoA's kernels: where they run, how to tune them. And its adapters.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# An example of each command, in groups by the reader's task.
COMMANDS: dict[str, dict[Callable[..., None], str]] = {
    "This machine": {info: "info"},
    "A model or an adapter": {
        inspect: "inspect path/to/adapter --base path/to/model",
        convert: "convert path/to/hira path/to/smoa --base path/to/model",
        merge: "merge path/to/model path/to/adapter path/to/merged",
    },
    "A GPU": {tune: "tune --model path/to/model --tokens 8192"},
}


for _group, _commands in COMMANDS.items():
    for _command, _example in _commands.items():
        _summary = (_command.__doc__ or "").partition("\n")[0]
        app.command(
            rich_help_panel=_group,
            short_help=f"{_summary}\nsmoa-kernels {_example}",
            epilog=f"Example: smoa-kernels {_example}",
        )(_command)


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show an error's traceback too.")] = False,
) -> None:
    context.obj["debug"] = debug
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), nl=False)  # rich has printed it and leaves nothing


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
        if options["debug"]:
            traceback.print_exception(error)
        return _fail(_message(error))
    return code if isinstance(code, int) else 0


def _message(error: Exception) -> str:
    if hasattr(error, "format_message"):  # a usage error of click; typer keeps its classes private
        context = getattr(error, "ctx", None)
        ask = "smoa-kernels --help" if context is None else f"{context.command_path} --help"
        words = str(error.format_message()).rstrip(".")
        return f"{words}{'' if words.endswith('?') else '.'} See {ask}"
    extra_is_missing = isinstance(error, ImportError) and error.name is None
    if (isinstance(error, (ValueError, OSError)) or extra_is_missing) and str(error):
        return str(error)
    what = f"{type(error).__name__}: {error}"
    return f"{what} (unexpected; smoa-kernels --debug shows where, info what to report)"


def _fail(message: str, code: int = 2) -> int:
    print(f"smoa-kernels: error: {' '.join(message.split())}", file=sys.stderr)
    return code
