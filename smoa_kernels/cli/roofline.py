"""`smoa-kernels roofline`: the predicted cost of one layer, for SMoA and the methods beside it."""

from __future__ import annotations

import math
import re
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..backends.algorithms import choose_algorithm
from ..checks import check_choice
from ..definition.block_rule import BLOCK_ORDERS, BlockRule
from ..definition.precision import PRECISIONS
from ..tuning.gpus import GPUS
from ..tuning.roofline import PASSES, WAYS, Estimate, Pass, Problem, backward_workspace, estimate
from .output import console

__all__ = ["roofline"]

STAGES: dict[str, tuple[Pass, ...]] = {"forward": PASSES[:1], "backward": PASSES[1:], "both": PASSES}
LABELS = {
    "frozen": "frozen",
    "lora": "LoRA",
    "hira": "HiRA",
    "paper_dense": "paper's dense",
    "merged": "SMoA merged",
    "split": "SMoA split",
    "fused": "SMoA fused",
}


def parse_shape(text: str) -> tuple[int, int]:
    """ "NxC" to (N, C)."""
    match = re.fullmatch(r"0*([1-9]\d{0,8})[x×]0*([1-9]\d{0,8})", text)
    if match is None:
        raise ValueError(
            f"--shape must be OUTxIN, two numbers from 1 to 999999999, for example 4096x14336, got {text!r}"
        )
    return int(match[1]), int(match[2])


def roofline(
    gpu: Annotated[str, typer.Option(help=f"One of {', '.join(GPUS)}.")] = "h100",
    tokens: Annotated[int, typer.Option(min=0, max=10**9, help="Tokens in the batch, T.")] = 8192,
    shape: Annotated[str, typer.Option(help="OUTxIN features of the layer, N×C.")] = "4096x4096",
    rank: Annotated[int, typer.Option(min=0, max=10**9, help="Rank budget of all blocks together, r.")] = 16,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks, K.")] = 4,
    block_order: Annotated[str, typer.Option(help=f"One of {', '.join(BLOCK_ORDERS)}.")] = "spectral",
    granule: Annotated[int, typer.Option(min=1, help="Adjacent coordinates that stay together.")] = 1,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(PRECISIONS)}.")] = "bf16",
) -> None:
    """Predict time and bytes of one layer for each way to run it. Nothing is measured."""
    check_choice("--gpu", gpu, GPUS)
    check_choice("--dtype", dtype, PRECISIONS)
    check_choice("--block-order", block_order, BLOCK_ORDERS)
    features = parse_shape(shape)
    if blocks > min(features):
        raise ValueError(f"--blocks must be at most {min(features)} for {shape}, got {blocks}")
    BlockRule(blocks, block_order, granule).check(features)
    together = granule
    if block_order == "contiguous" and not any(size % (blocks * granule) for size in features):
        together = math.gcd(*(size // blocks for size in features))
    problem = Problem(tokens, *features, blocks, rank, dtype, together)
    chosen = choose_algorithm("forward", tokens, problem.max_rank, dtype, GPUS[gpu].arch)
    estimates = {way: estimate(problem, GPUS[gpu], way) for way in WAYS}
    workspace = max(backward_workspace(problem).values())

    out = console()
    order = block_order if granule == 1 else f"{block_order} in granules of {granule}"
    out.print(_table(estimates, chosen, f"{shape}, T={tokens}, r={rank}, K={blocks} {order}, {dtype}, {gpu}"))
    out.print(
        "A pass launched from Python takes the longer of device and host; in a CUDA graph, the device's time."
    )
    out.print(
        f"Workspace of our backward: {workspace / 2**20:.0f} MiB. Every number is predicted, none measured."
    )


def _table(estimates: dict[str, Estimate], chosen: str, title: str) -> Table:
    caption = f'* what algorithm="auto" runs: {chosen}'
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, padding=0)
    table.add_column("", no_wrap=True)
    for heading in (*(f"{stage}\nms" for stage in STAGES), "device\nms", "host\nms", "launches"):
        table.add_column(heading, justify="right")
    for heading in ("/frozen", "/LoRA", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    bases = [estimates[name].seconds() for name in ("frozen", "lora")]
    for name, found in estimates.items():
        seconds = [found.seconds(*stages) for stages in STAGES.values()]
        table.add_row(
            f"{LABELS[name]}{'*' if name == chosen else ''}",
            *(f"{each * 1e3:.3f}" for each in (*seconds, found.device_seconds(), found.host_seconds())),
            f"{found.launches()}",
            *(f"{found.seconds() / base:.2f}" if base else "-" for base in bases),
            "predicted",
            style="bold" if name == chosen else None,
        )
    return table
