"""`smoa-kernels merge`: a base model with an adapter merged into it, as a plain model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..checks import check_choice
from ..definition.precision import DTYPES, dtype_names
from .output import console, progress_of

_DTYPES = {dtype_names([dtype]): dtype for dtype in DTYPES}


def merge(
    base: Annotated[
        Path, typer.Argument(help="Folder of a base model in safetensors files, or a GGUF file.")
    ],
    adapter: Annotated[Path, typer.Argument(help="Folder of an SMoA or HiRA adapter.")],
    out: Annotated[Path, typer.Argument(help="Folder for the merged model: new, or empty.")],
    dtype: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(_DTYPES)}; each tensor keeps its own if absent.")
    ] = None,
) -> None:
    """Merge an adapter into its base model: a model of its own that any program serves.

    Of a quantised base (compressed-tensors, GPTQ, AWQ, NF4, Q4_0, Q8_0) only the scales change; the adapter's groups of
    columns must be the base's.
    """
    if dtype is not None:
        check_choice("--dtype", dtype, _DTYPES)
    from ..adapter_folder.merging import merge_to_folder

    with progress_of("merging") as progress:
        kind = None if dtype is None else _DTYPES[dtype]
        report = merge_to_folder(base, adapter, out, dtype=kind, progress=progress)
    files = "1 file" if len(report.files) == 1 else f"{len(report.files)} files"
    text = f"{out}: {report.tensors} tensors, {report.changed} of them changed; {report.size:,} bytes in {files}."
    console().print(text, highlight=False, soft_wrap=True)
