"""`smoa-kernels plan`: predicted memory and communication of a whole model on many GPUs."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD

from ..checks import check_choice
from ..tuning.gpus import GPUS
from ..tuning.models import MODELS
from ..tuning.scaling import Plan, predict
from .output import console, table_of

PARALLEL = ("ddp", "fsdp")
WHOLE = {name: decoder for name, decoder in MODELS.items() if decoder.layers}
"""Models whose sizes are all known."""
LARGE = [name for name, gpu in GPUS.items() if gpu.memory_gb >= 80]
"""GPUs that are used in large numbers."""
LABELS = {"full": "full fine-tuning", "lora": "LoRA", "smoa": "SMoA"}


def plan(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(WHOLE)}.")] = "llama-3-8b",
    gpus: Annotated[int, typer.Option(min=1, max=10**9, help="How many GPUs, eight to a node.")] = 8,
    parallel: Annotated[str, typer.Option(help=f"One of {', '.join(PARALLEL)}.")] = "fsdp",
    gpu: Annotated[str, typer.Option(help=f"One of {', '.join(LARGE)}.")] = "h100",
    tokens: Annotated[int, typer.Option(min=1, max=10**9, help="Tokens of one replica in a step, T.")] = 8192,
    rank: Annotated[int, typer.Option(min=1, max=10**9, help="Rank budget r, of LoRA and of SMoA.")] = 16,
    blocks: Annotated[int, typer.Option(min=1, help="Spectral blocks, K.")] = 4,
    markdown: Annotated[bool, typer.Option("--markdown", help="A table for a document.")] = False,
) -> None:
    """Predict each GPU's memory and communication for full fine-tuning, LoRA and SMoA. Nothing is measured."""
    check_choice("--model", model, WHOLE)
    check_choice("--parallel", parallel, PARALLEL)
    check_choice("--gpu", gpu, LARGE)
    decoder, one = WHOLE[model], GPUS[gpu]
    smallest = min(map(min, decoder.linears))
    if blocks > smallest:
        raise ValueError(f"--blocks must be at most {smallest}, the narrowest layer of {model}, got {blocks}")
    sizes = {"tokens": tokens, "rank": rank, "num_blocks": blocks}
    rows = [
        _row(label, predict(method, decoder, one, gpus, fsdp=parallel == "fsdp", **sizes), one.memory_gb)
        for method, label in LABELS.items()
    ]
    how = "FSDP2" if parallel == "fsdp" else "DDP"
    title = f"{model}, {gpus} × {gpu}, {how}, T={tokens}, r={rank}, K={blocks}"
    if markdown:
        print(f"**{title}**\n")
        headings = [heading.strip() for heading in rows[0]]
        rule = ["---", *["--:"] * (len(headings) - 1)]
        for cells in (headings, rule, *(row.values() for row in rows)):
            print(f"| {' | '.join(cells)} |")
    else:
        console().print(table_of(rows, title=title, box=SIMPLE_HEAD, padding=0))
        console().print("GB is 10⁹ bytes. Every number is predicted, none measured (docs/scaling.md).")


def _row(label: str, found: Plan, capacity: int) -> dict[str, str]:
    """The cells of a method by their headings."""
    memory, gb = found.memory, _gigabytes
    total = sum(memory.values())
    return {
        "": label,
        "trained, M": f"{found.trained_parameters / 1e6:,.1f}",
        **{
            part: gb(memory[part])
            for part in ("weights", "gradients", "optimizer", "labels", "gathered layers")
        },
        "activations": gb(memory["activations"] + memory["logits"]),
        "workspace": gb(memory["workspace"]),
        "GB in all": gb(total),
        "fits": "yes" if total <= capacity * 1e9 else "no",
        "sent, GB": gb(sum(found.traffic.values())),
        "compute, s": f"{found.compute_seconds:.2f}",
        "sending, s": f"{found.traffic_seconds:.3f}",
        "kind": "predicted",
    }


def _gigabytes(size: float) -> str:
    """In 10⁹ bytes, to three digits; a dash for zero."""
    if not size:
        return "-"
    value = size / 1e9
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 else f"{value:.4f}"
