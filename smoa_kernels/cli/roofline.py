"""`smoa-kernels roofline`: the predicted cost of one layer, for SMoA and the methods beside it."""

from __future__ import annotations

import math
import re
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD

from ..backends.algorithms import choose_algorithm
from ..checks import check_choice
from ..definition.block_rule import BLOCK_ORDERS, BlockRule
from ..definition.precision import PRECISIONS
from ..tuning.gpus import GPUS
from ..tuning.roofline import PASSES, WAYS, Estimate, Problem, backward_workspace
from .output import console, table_of

LABELS = {
    "frozen": "frozen",
    "lora": "LoRA (PEFT)",
    "lora_fused": "LoRA, fused",
    "hira": "HiRA",
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
    rank: Annotated[int, typer.Option(min=0, max=10**9, help="Rank budget of all blocks together, r.")] = 8,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks, K.")] = 2,
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
    chosen = choose_algorithm(tokens, problem.max_rank, dtype, GPUS[gpu].arch)
    estimates = {way: Estimate(problem, GPUS[gpu], way) for way in WAYS}
    workspace = backward_workspace(problem)

    out = console()
    order = block_order if granule == 1 else f"{block_order} in granules of {granule}"
    title = f"{shape}, T={tokens}, r={rank}, K={blocks} {order}, {dtype}, {gpu}"
    caption = f'* what algorithm="auto" runs: {chosen}'
    rows = [_row(way, estimates, chosen=way == chosen) for way in WAYS]
    out.print(table_of(rows, title=title, caption=caption, box=SIMPLE_HEAD, padding=0))
    out.print(
        "A pass launched from Python takes the longer of device and host; in a CUDA graph, the device's time."
    )
    out.print(
        f"Workspace of our backward: {workspace / 2**20:.0f} MiB. Every number is predicted, none measured."
    )


def _row(way: str, estimates: dict[str, Estimate], *, chosen: bool) -> dict[str, str]:
    """The cells of a way by their headings."""
    found = estimates[way]
    over = {"frozen": "frozen", "LoRA": "lora", "fused\nLoRA": "lora_fused"}
    stages = {"forward": PASSES[:1], "backward": PASSES[1:], "both": PASSES}
    seconds = {stage: found.seconds(*passes) for stage, passes in stages.items()}
    seconds |= {"device": found.device_seconds(), "host": found.host_seconds()}
    return {
        "": f"{LABELS[way]}{'*' if chosen else ''}",
        **{f"{name}\nms": f"{each * 1e3:.3f}" for name, each in seconds.items()},
        "launches": f"{found.launches()}",
        **{f"/{name}": f"{found.seconds() / estimates[other].seconds():.2f}" for name, other in over.items()},
        " ": "predicted",
    }
