"""`smoa-kernels roofline`: the predicted cost of one layer, for SMoA and the methods it is compared with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..backends.algorithms import choose_algorithm
from ..checks import check_choice
from ..definition.block_rule import BLOCK_ORDERS, BlockRule
from ..definition.precision import PRECISIONS
from ..tuning.counts import WAYS, Problem
from ..tuning.gpus import GPUS
from ..tuning.roofline import Estimate, backward_workspace_bytes, estimate
from .output import console, write_json

__all__ = ["roofline"]

STAGES = ("forward", "backward", "both")
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
    dropout: Annotated[float, typer.Option(help="Dropout probability of the adapter.")] = 0.0,
    bias: Annotated[bool, typer.Option("--bias", help="The layer has a bias.")] = False,
    parts: Annotated[bool, typer.Option("--parts", help="List every kernel that is counted.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the same as JSON.")] = None,
) -> None:
    """Predict time, bytes and flops of one layer for each way to run it. Nothing is measured."""
    check_choice("--gpu", gpu, GPUS)
    check_choice("--dtype", dtype, PRECISIONS)
    check_choice("--block-order", block_order, BLOCK_ORDERS)
    if not 0 <= dropout < 1:
        raise ValueError(f"--dropout must lie in [0, 1), got {dropout}")
    torch_dtype, ieee = PRECISIONS[dtype].dtype, PRECISIONS[dtype].ieee
    features = parse_shape(shape)
    if blocks > min(features):
        raise ValueError(f"--blocks must be at most {min(features)} for {shape}, got {blocks}")
    granularity = BlockRule(blocks, block_order, granule).granularity(features)
    problem = Problem(tokens, *features, blocks, rank, torch_dtype, dropout, bias, granularity)
    chosen = choose_algorithm("forward", tokens, problem.max_rank, dtype, GPUS[gpu].arch)
    chosen = "split" if dropout else chosen
    ways = [a for a in WAYS if not dropout or a not in ("merged", "fused")]
    estimates = {a: estimate(problem, GPUS[gpu], a, ieee=ieee) for a in ways}

    out = console()
    order = block_order if granule == 1 else f"{block_order} in granules of {granule}"
    out.print(_table(estimates, chosen, f"{shape}, T={tokens}, r={rank}, K={blocks} {order}, {dtype}, {gpu}"))
    out.print(
        "A pass launched from Python takes the longer of device and host; in a CUDA graph, the device's time."
    )
    workspace = backward_workspace_bytes(problem) / 2**20
    out.print(f"Workspace of our backward: {workspace:.0f} MiB. Every number is predicted, none measured.")
    if dropout:
        out.print("With dropout the adapter sees another x than the base, so SMoA can only run split.")
    if parts:
        for name, found in estimates.items():
            out.print(_parts_table(name, found))
    if json is not None:
        inputs = {
            "gpu": gpu,
            "tokens": tokens,
            "out_features": features[0],
            "in_features": features[1],
            "rank": rank,
            "num_blocks": blocks,
            "block_order": block_order,
            "granule": granule,
            "dtype": dtype,
            "dropout": dropout,
            "bias": bias,
        }
        write_json(json, _as_json(inputs, estimates, chosen, backward_workspace_bytes(problem)))


def _table(estimates: dict[str, Estimate], chosen: str, title: str) -> Table:
    caption = f'* what algorithm="auto" runs: {chosen}'
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, padding=0)
    table.add_column("", no_wrap=True)
    for heading in ("forward", "backward", "both"):
        table.add_column(f"{heading}\nms", justify="right")
    for heading in ("device\nms", "host\nms", "launches", "/frozen", "/LoRA"):
        table.add_column(heading, justify="right")
    table.add_column("", no_wrap=True)
    for name, found in estimates.items():
        table.add_row(
            f"{LABELS[name]}{'*' if name == chosen else ''}",
            *(f"{found.seconds(stage) * 1e3:.3f}" for stage in STAGES),  # type: ignore[arg-type]
            f"{found.device_seconds() * 1e3:.3f}",
            f"{found.host_seconds() * 1e3:.3f}",
            f"{found.launches()}",
            _ratio(found, estimates["frozen"]),
            _ratio(found, estimates["lora"]),
            "predicted",
            style="bold" if name == chosen else None,
        )
    return table


def _ratio(found: Estimate, base: Estimate) -> str:
    return f"{found.seconds() / base.seconds():.2f}" if base.seconds() else "-"


def _parts_table(name: str, found: Estimate) -> Table:
    table = Table(title=LABELS[name])
    for heading in ("part", "", "ms", "GFLOP", "MB", "launches"):
        table.add_column(heading, justify="left" if heading in ("part", "") else "right")
    for part in found.parts:
        table.add_row(
            part.name,
            part.stage,
            f"{part.seconds(found.rates) * 1e3:.4f}",
            f"{part.flops / 1e9:.1f}",
            f"{part.bytes / 1e6:.1f}",
            f"{part.launches}",
        )
    return table


def _as_json(
    inputs: dict[str, Any], estimates: dict[str, Estimate], chosen: str, workspace: int
) -> dict[str, Any]:
    return {
        "kind": "predicted",
        **inputs,
        "auto": chosen,
        "backward_workspace_bytes": workspace,
        "algorithms": {
            name: {
                **{
                    stage: {
                        "milliseconds": found.seconds(stage) * 1e3,  # type: ignore[arg-type]
                        "device_milliseconds": found.device_seconds(stage) * 1e3,  # type: ignore[arg-type]
                        "host_milliseconds": found.host_seconds(stage) * 1e3,  # type: ignore[arg-type]
                        "launches": found.launches(stage),  # type: ignore[arg-type]
                        "flops": found.flops(stage),  # type: ignore[arg-type]
                        "bytes": found.bytes(stage),  # type: ignore[arg-type]
                    }
                    for stage in STAGES
                },
                "parts": [vars(part) for part in found.parts],
            }
            for name, found in estimates.items()
        },
    }
