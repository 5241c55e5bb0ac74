"""`smoa-kernels tune`: its options. What they do is in `tune_run.py`, which imports Triton."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..checks import check_choices
from ..tuning.gpus import GPUS
from ..tuning.models import MODELS
from .needs import needs_triton

__all__ = ["tune"]


def tune(
    model: Annotated[list[str] | None, typer.Option(help=f"Repeatable: {', '.join(MODELS)}.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="OUTxIN features of a layer, repeatable.")] = None,
    from_model: Annotated[
        Path | None, typer.Option(help="Shapes of a model on disk: its config.json or folder.")
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(max=10**9, help="Tokens in a batch, repeatable; 256, 2048 and 8192 if absent."),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="Repeatable: bf16, fp16, tf32, fp32; bf16 if absent.")
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank budget of all blocks together, r.")] = 16,
    blocks: Annotated[int, typer.Option(help="Spectral blocks, K.")] = 4,
    granule: Annotated[
        int,
        typer.Option(
            help="Adjacent coordinates that blocks keep together; 8 stands for its multiples and contiguous blocks."
        ),
    ] = 1,
    kernel: Annotated[
        list[str] | None, typer.Option(help="Repeatable; every kernel, and the algorithms, if absent.")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(min=0.0, help="Minutes, compiling included; a rerun goes on where they ran out."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be timed, what not and why. Needs no GPU.")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(help=f"With --dry-run: {', '.join(GPUS)}; the one here, else h100, if absent."),
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes that compile; one per core.")] = None,
) -> None:
    """Measure what is fastest on this GPU, check its numbers, and keep the winners in your table."""
    needs_triton("to tune")
    from .tune_run import TUNABLE, dry, layers_of, measure

    layers = layers_of(
        model or [],
        shape or [],
        from_model,
        tokens or [256, 2048, 8192],
        dtype or ["bf16"],
        rank,
        blocks,
        granule,
    )
    check_choices("--kernel", kernel or [], TUNABLE)
    kernels = kernel or TUNABLE
    if dry_run:
        dry(layers, kernels, gpu, jobs)
    elif gpu is not None:
        raise ValueError(
            "--gpu names a GPU that is not here: add --dry-run, or leave --gpu out to tune the one here"
        )
    else:
        measure(layers, kernels, budget, jobs)
