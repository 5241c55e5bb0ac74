"""`smoa-kernels tune`: checks the request, measures, reports the winners."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..backends import triton_obstacle
from ..checks import check_choice, check_choices
from ..definition.precision import KERNEL_PRECISIONS
from ..kernels.architectures import architecture, identity, multiprocessors
from ..kernels.spec import Key
from ..kernels.table import INTERRUPTED, Entry, keep, user_table
from ..tuning.gpus import GPUS
from ..tuning.models import MODELS, read_config
from ..tuning.plan import (
    Job,
    check_layer,
    describe,
    describe_choice,
    jobs,
    tunable,
)
from ..tuning.problem import Problem, parse_shape
from .output import console, progress_of, table_of

DEFAULT_GPU = "h100"
"""The GPU of a dry run if there is none here and none was named."""


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
    experts: Annotated[
        int,
        typer.Option(help="Experts that a layer has; --tokens are then pairs of token and expert. 0: none."),
    ] = 0,
    factors: Annotated[
        str, typer.Option(help="Dtype of the factors: bf16, fp16, or fp32, as PEFT keeps them.")
    ] = "fp32",
    kernel: Annotated[
        list[str] | None, typer.Option(help="Repeatable; every kernel, and the algorithms, if absent.")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(min=0.0, help="Minutes, compiling included; a rerun goes on where they ran out."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be timed. Needs no GPU.")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(help=f"With --dry-run: {', '.join(GPUS)}; the one here, else h100, if absent."),
    ] = None,
) -> None:
    """Measure what is fastest on this GPU, check its numbers, and keep the winners in your table."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            "triton is not installed: there are no kernels to tune; pip install 'smoa-kernels[triton]'"
        )
    check_choices("--model", model or [], MODELS)
    check_choices("--dtype", dtype or [], KERNEL_PRECISIONS)
    check_choices("--kernel", kernel or [], tunable())
    decoders = [MODELS[name] for name in model or []]
    if from_model is not None:
        decoders.append(read_config(from_model))
    if not decoders and not shape:
        decoders = [MODELS["llama-3-8b"]]
    sizes = [size for decoder in decoders for size in decoder.linears] + [parse_shape(s) for s in shape or []]
    layers = [
        Problem(t, n, c, blocks, rank, name, granule, experts, factors)
        for n, c in dict.fromkeys(sizes)
        for t in tokens or [256, 2048, 8192]
        for name in dtype or ["bf16"]
    ]
    for layer in layers:
        check_layer(layer)
    if gpu is not None:
        check_choice("--gpu", gpu, GPUS)
        if not dry_run:
            raise ValueError(
                "--gpu names a GPU that is not here: add --dry-run, or leave --gpu out to tune the one here"
            )
    device = _device_here()
    if device is None and not dry_run:
        raise ValueError(
            "there is no CUDA or ROCm GPU here to tune; add --dry-run to list what would be timed on an "
            f"{DEFAULT_GPU}, or on another with --gpu"
        )
    if gpu is not None or device is None:
        published = GPUS[gpu or DEFAULT_GPU]
        name, arch, processors = published.name, published.arch, published.multiprocessors
    else:
        name, arch, processors = str(device), architecture(device), multiprocessors(device)
    if arch.startswith("gfx") and "tf32" in (dtype or []):
        raise ValueError(
            "--dtype tf32 is never asked for on AMD, which multiplies float32 in IEEE: give fp32"
        )
    planned = jobs(layers, arch, processors, kernel or ())
    if dry_run or device is None:
        _list(planned, f"{name} ({arch})")
    else:
        _measure(planned, device, None if budget is None else time.monotonic() + 60 * budget)


def _device_here() -> torch.device | None:
    """The GPU that is tuned: the current one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def _list(planned: Sequence[Job], where: str) -> None:
    headings = "problem", "without a table", "candidates"
    cells = (
        (describe(job.key), describe_choice(job.candidates[0]), str(len(job.candidates))) for job in planned
    )
    rows = [dict(zip(headings, row, strict=True)) for row in cells]
    console().print(table_of(rows, title=f"What would be timed on {where}"))
    timed = sum(len(job.candidates) for job in planned)
    words = f"{timed} candidates of {len(planned)} problems. Nothing was measured."
    console().print(words, highlight=False)


def _measure(planned: Sequence[Job], device: torch.device, deadline: float | None) -> None:
    """Tune on the GPU here; exits 130 when interrupted and keeps the results so far."""
    # Here, because it imports Triton.
    from ..tuning.measure import DeviceLostError, gpu_timer, left
    from ..tuning.measure import tune as measure

    if (obstacle := triton_obstacle(device)) is not None:
        raise ValueError(f"the kernels cannot run here: {obstacle}; smoa-kernels info shows what can")
    now = identity(device)
    known = keep(now).entries  # fails before anything is compiled if the table cannot be written
    code, problems, stopped = 0, dict[Key, str](), ""
    try:
        with progress_of("measuring") as bar:
            done, total = count(1), sum(len(left(job, known.get(job.key))) for job in planned)
            problems = measure(
                planned, device, timer=gpu_timer, deadline=deadline, progress=lambda: bar(next(done), total)
            )
    except KeyboardInterrupt:
        code, stopped = 130, "Interrupted: what was found is kept, the same command goes on from here."
    except DeviceLostError as error:
        code, stopped = 1, str(error)
    found = keep(now).entries
    rows = [_row(job, found[job.key]) for job in planned if job.key in found]
    console().print(table_of(rows, title="Heuristic against tuned, medians"))
    lines = [
        *_failures(planned, found),
        *(f"not done: {describe(key)}: {problem}" for key, problem in problems.items()),
        f"Kept in {user_table(now.gpu)}",
    ]
    if stopped or problems:
        lines.append(stopped or "The same command goes on with what is not done.")
    for line in lines:
        typer.echo(line)
    if code:
        raise typer.Exit(code)


def _row(job: Job, entry: Entry) -> dict[str, str]:
    """The heuristic's and the tuned time of a problem, in microseconds."""
    trials = entry.trial(job.candidates[0]), entry.best()
    before, after = (trial.seconds if trial else None for trial in trials)
    return {
        "problem": describe(job.key),
        "choice": describe_choice(trials[1].choice) if trials[1] else "-",
        "tried": f"{len(entry.trials)} of {len(job.candidates)}",
        "heuristic µs": f"{before * 1e6:.1f}" if before else "-",
        "tuned µs": f"{after * 1e6:.1f}" if after else "-",
        "ratio": f"{after / before:.2f}" if before and after else "-",
    }


def _failures(jobs: Sequence[Job], found: Mapping[Key, Entry]) -> Iterator[str]:
    """A line for every candidate that was tried and not timed."""
    for entry in (found[job.key] for job in jobs if job.key in found):
        for trial in entry.trials:
            if trial.seconds is None and trial.reason != INTERRUPTED:
                yield f"failed: {describe(entry.key)} at {describe_choice(trial.choice)}: {trial.reason}"
