"""The command line of the examples: mistakes are one line, and a run never mixes with an earlier one's files."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import typer

# transformers renamed an option; PEFT 0.21 and TRL still use the old name.
warnings.filterwarnings("ignore", message=".*activation_checkpointing", category=FutureWarning)


def run_command(command: Callable[..., None], arguments: list[str] | None = None) -> int:
    """Run an example and return its exit code: 2 after bad input or a missing file, told in one line on stderr."""
    app = typer.Typer(add_completion=False)
    app.command()(command)
    try:
        return app(arguments, standalone_mode=False) or 0
    except typer.TyperException as error:
        message, code = error.format_message(), error.exit_code
    except (OSError, ValueError) as error:
        message, code = str(error), 2
    except KeyboardInterrupt:
        message, code = "interrupted; --resume goes on from the last checkpoint, where there is one", 130
    print("error:", *message.split(), file=sys.stderr)
    return code


def checkpoint_of(output: Path, resume: bool) -> str | None:
    """Return the checkpoint of transformers' Trainer to resume from; None for a new run, whose folder must be empty.

    Raises:
        ValueError: if a new run's folder holds something, or there is no whole checkpoint to resume from.
    """
    if not resume:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ValueError(f"--output {output} is not a new or empty folder; --resume goes on with a run")
        return None
    # The Trainer writes its state last: a checkpoint without it was cut short.
    whole = [state.parent for state in output.glob("checkpoint-*/trainer_state.json")]
    if not whole:
        raise ValueError(f"--resume: there is no checkpoint in {output}")
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2])))
