"""`smoa-kernels tune`: checks the request, measures, and prints each key's winner."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..backends import MOST_TRITON_RANKS, triton_unsupported_reason
from ..checks import check_choices, first_line
from ..definition.precision import KERNEL_PRECISIONS
from ..kernels.architectures import ARCHITECTURES, architecture, gpu_name, multiprocessors
from ..kernels.table import user_table


def tune(
    model: Annotated[
        list[Path] | None, typer.Option(help="Folder of a model, repeatable: its layers.")
    ] = None,
    shape: Annotated[list[str] | None, typer.Option(help="OUTxIN features of a layer, repeatable.")] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, max=10**9, help="Tokens in a batch, repeatable; 2048 if absent."),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help=f"Repeatable: {', '.join(KERNEL_PRECISIONS)}; bf16 if absent.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank budget of all blocks together, r.")] = 8,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks, K.")] = 2,
    contiguous: Annotated[bool, typer.Option(help="Blocks are slices of W0, not spectral.")] = False,
    experts: Annotated[
        int, typer.Option(min=0, help="Experts of a layer; --tokens are then pairs of token and expert.")
    ] = 0,
    factors: Annotated[str, typer.Option(help="Dtype of the factors: bf16, fp16 or fp32, PEFT's.")] = "fp32",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be timed; on a GPU also compile it.")
    ] = False,
) -> None:
    """Measure what is fastest on this GPU, check its numbers, and keep the winners in your table."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            "triton is not installed: there are no kernels to tune; pip install 'smoa-kernels[triton]'"
        )
    check_choices("--dtype", dtype or [], KERNEL_PRECISIONS)
    check_choices("--factors", [factors], ("bf16", "fp16", "fp32"))
    sizes = [size for folder in model or [] for size in linear_layers(folder)] + [
        parse_shape(text) for text in shape or []
    ]
    if not sizes:
        raise ValueError("nothing to tune: give --model FOLDER or --shape OUTxIN")
    if blocks > (most := min(min(size) for size in sizes)):
        raise ValueError(f"--blocks must be at most {most}, the least features of a layer, got {blocks}")
    if rank > (most := MOST_TRITON_RANKS * blocks):
        raise ValueError(f"--rank must be at most {most} in {blocks} blocks, got {rank}")
    from ..tuning import tuner  # imports Triton

    layers = [
        tuner.Layer(*size, count, name, rank, blocks, contiguous, experts, factors)
        for size in dict.fromkeys(sizes)
        for count in tokens or [2048]
        for name in dtype or ["bf16"]
    ]
    device = device_here()
    if device is None and not dry_run:
        raise ValueError("there is no CUDA or ROCm GPU here to tune; --dry-run lists what would be timed")
    if device is not None and (reason := triton_unsupported_reason(device)) is not None:
        raise ValueError(f"the kernels cannot run here: {reason}; smoa-kernels info shows what can")
    arch = next(iter(ARCHITECTURES)) if device is None else architecture(device)
    planned = tuner.jobs(layers, arch, 1 if device is None else multiprocessors(device))
    if dry_run or device is None:
        for job in planned:
            typer.echo(f"{job.key}: {len(job.candidates)} candidates")
        compiled = tuner.compile_ahead(planned) if torch.cuda.is_available() else 0
        typer.echo(f"{len(planned)} keys, {compiled} kernels compiled.")
        return
    try:
        for job, entry in tuner.tune(planned, device):
            if isinstance(entry, str):
                typer.echo(f"{job.key}: not tuned, {entry}")
                continue
            times = f"{1e6 * entry['seconds']:.1f} µs, {1e6 * entry['default_seconds']:.1f} without a table"
            typer.echo(f"{job.key}: {entry['choice']}, {times}")
            for choice, why in entry["refused"].items():
                typer.echo(f"    refused: {choice}: {why}")
    finally:  # also when the user interrupts
        typer.echo(f"Kept in {user_table(gpu_name(device))}; the same command measures what is not there.")


def device_here() -> torch.device | None:
    """The GPU that is tuned: the current device."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def parse_shape(text: str) -> tuple[int, int]:
    """OUTxIN features as numbers."""
    sizes = re.fullmatch(r"([1-9]\d{0,8})[xX×]([1-9]\d{0,8})", text)
    if sizes is None:
        raise ValueError(f"--shape must be OUTxIN, such as 4096x14336, got {text!r}")
    return int(sizes[1]), int(sizes[2])


def linear_layers(folder: Path) -> list[tuple[int, int]]:
    """(N, C) of a model's linear layers, its head left out; no weight is read."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model must be the folder of a model with its config.json, got {str(folder)!r}")
    from transformers import AutoConfig, AutoModel

    try:
        with torch.device("meta"):
            model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    except Exception as error:  # transformers raises any
        raise ValueError(
            f"--model {folder} has a config.json without a model: {first_line(error)}"
        ) from error
    linear = (module for module in model.modules() if isinstance(module, torch.nn.Linear))
    return list(dict.fromkeys((layer.out_features, layer.in_features) for layer in linear))
