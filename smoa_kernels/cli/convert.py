"""`smoa-kernels convert`: a HiRA adapter of PEFT as an SMoA adapter with one block, or the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import console, progress_of


def convert(
    folder: Annotated[Path, typer.Argument(help="Folder of a HiRA or SMoA adapter.")],
    out: Annotated[Path, typer.Argument(help="New or empty folder for the converted adapter.")],
    base: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the base model, for sketches of its weights and shapes of convolutions and embeddings; if "
            "absent, the base that the adapter names."
        ),
    ] = None,
) -> None:
    """Convert a HiRA adapter of PEFT into an SMoA adapter with one block, or the other way round."""
    from ..peft.hira.convert import convert_adapter

    with progress_of("converting") as progress:
        method = convert_adapter(folder, out, base, progress)
    console().print(f"{out}: {method}, converted from {folder}.", highlight=False, soft_wrap=True)
