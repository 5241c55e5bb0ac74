"""Predict costs on GPUs, as tables in Markdown: `python -m benchmarks.predict roofline|plan|serving`."""

from __future__ import annotations

import re
import sys
from typing import Annotated

import typer

from smoa_kernels.backends.algorithms import choose_algorithm
from smoa_kernels.checks import check_choice
from smoa_kernels.definition.precision import PRECISIONS

from ..tables import table
from .gpus import GPUS
from .roofline import PASSES, WAYS, Estimate, Problem, backward_workspace
from .scaling import METHODS, MODELS, predict

Count = Annotated[int, typer.Option(min=1, max=10**9)]
GpuName = Annotated[str, typer.Option(help=f"One of {', '.join(GPUS)}.")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def roofline(
    gpu: GpuName = "h100",
    tokens: Count = 8192,
    shape: Annotated[str, typer.Option(help="OUTxIN features of the layer.")] = "4096x4096",
    rank: Count = 8,
    blocks: Count = 2,
    granule: Count = 1,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(PRECISIONS)}.")] = "bf16",
) -> None:
    """Predict the time of one layer for each way to run it. The granule of contiguous blocks is their size."""
    check_choice("--gpu", gpu, GPUS)
    check_choice("--dtype", dtype, PRECISIONS)
    if (sizes := re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", shape)) is None:
        raise ValueError(f"--shape must be OUTxIN, for example 4096x14336, got {shape!r}")
    problem = Problem(tokens, int(sizes[1]), int(sizes[2]), blocks, rank, dtype, granule)
    if blocks * granule > min(problem.features):
        raise ValueError(f"--blocks times --granule must be at most {min(problem.features)} for {shape}")
    chosen = choose_algorithm(tokens, problem.max_rank, dtype, GPUS[gpu].arch)
    found = {way: Estimate(problem, GPUS[gpu], way) for way in WAYS}
    rows = []
    for way, cost in found.items():
        times = (f"{1e3 * cost.seconds(*stages):.3f}" for stages in (PASSES[:1], PASSES[1:], PASSES))
        over = (f"{cost.seconds() / found[it].seconds():.2f}" for it in ("frozen", "lora", "lora_fused"))
        rows.append((way + "*" * (way == chosen), *times, *over, "predicted"))
    print(f"**{shape}, T={tokens}, r={rank}, K={blocks}, {dtype}, {gpu}**\n")
    headings = (
        "",
        "forward, ms",
        "backward, ms",
        "both, ms",
        "/frozen",
        "/lora",
        "/lora_fused",
        "kind",
    )
    print(table(headings, rows))
    print(f'* algorithm="auto". Workspace of our backward: {backward_workspace(problem) / 2**20:.0f} MiB.')


@app.command()
def plan(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "llama-3-8b",
    gpus: Count = 8,
    fsdp: Annotated[bool, typer.Option("--fsdp/--no-fsdp", help="FSDP2, else DDP.")] = True,
    gpu: GpuName = "h100",
    tokens: Count = 8192,
    rank: Count = 8,
    blocks: Count = 2,
) -> None:
    """Predict each GPU's memory and communication in a step, of T=TOKENS per replica. Sizes are in 10⁹ bytes."""
    check_choice("--model", model, MODELS)
    check_choice("--gpu", gpu, GPUS)
    columns = []
    for method in METHODS:
        sizes = {"tokens": tokens, "rank": rank, "num_blocks": blocks}
        cost = predict(method, MODELS[model], GPUS[gpu], gpus, fsdp=fsdp, **sizes)
        total = sum(cost.memory.values())
        cells = {"trained parameters, millions": f"{cost.trained_parameters / 1e6:,.1f}"}
        cells |= {f"{part}, GB": _gigabytes(size) for part, size in cost.memory.items()}
        fits = total <= GPUS[gpu].memory_gb * 1e9
        cells |= {"**in all, GB**": f"**{_gigabytes(total)}** ({'fits' if fits else 'too much'})"}
        cells |= {"sent in a step, GB": _gigabytes(sum(cost.traffic.values()))}
        cells |= {"computing, s": f"{cost.compute_seconds:.2f}", "sending, s": f"{cost.traffic_seconds:.3f}"}
        columns.append(cells)
    how = "FSDP2" if fsdp else "DDP"
    print(f"**{model}, {gpus} × {gpu}, {how}, T={tokens}, r={rank}, K={blocks}, predicted**\n")
    rows = [(name, *(cells[name] for cells in columns)) for name in columns[0]]
    print(table(("on each GPU", *METHODS.values()), rows))


@app.command()
def serving(gpu: GpuName = "h100") -> None:
    """Predict a decode step's products with an adapter for each of T sequences, over the base's: T r rows beside T."""
    check_choice("--gpu", gpu, GPUS)
    to_read, to_multiply = 2 / GPUS[gpu].bytes_per_second(), 2 / GPUS[gpu].flops_per_second("bf16")
    ranks, rows = (4, 8, 16, 32), []
    for n in (8, 32, 64):
        base, *adapted = (max(to_read, n * each * to_multiply) for each in (1, *ranks))
        rows.append((f"{n}", *(f"{(base + each) / base:.1f}" for each in adapted)))
    print(table(("T", *(f"r={rank}" for rank in ranks)), rows))


def _gigabytes(size: float) -> str:
    """In 10⁹ bytes, to three digits; a dash for zero."""
    digits = ",.0f" if size >= 1e11 else ".3g" if size >= 1e6 else ".4f"
    return f"{size / 1e9:{digits}}" if size else "-"


if __name__ == "__main__":
    try:
        app()
    except ValueError as error:
        sys.exit(f"error: {error}")
