"""What `smoa-kernels tune` does: check the request, prune, measure, report what won. Imports Triton."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import typer
from rich.table import Table

from ..backends import triton_obstacle
from ..backends.algorithms import admissible
from ..checks import check_choice, check_choices
from ..definition.precision import KERNEL_PRECISIONS
from ..kernels import KERNELS
from ..kernels.identity import identity
from ..kernels.spec import Key
from ..kernels.table import INTERRUPTED, Entry, describe, keep, read, update, user_table
from ..tuning.format import describe_algorithms, describe_choice, winner
from ..tuning.gpus import GPUS
from ..tuning.models import MODELS, read_config
from ..tuning.plan import TUNABLE, Layer, Target, jobs
from ..tuning.space import broken
from ..tuning.tuner import DeviceLostError, Job, Timer, gpu_timer, left, so_far, tune
from .output import console, progress_bar, progress_of
from .roofline import parse_shape

__all__ = ["TUNABLE", "dry", "layers_of", "measure"]

timer: Timer = gpu_timer

DEFAULT_GPU = "h100"
"""What a dry run is for where there is no GPU, and none was named."""


def layers_of(
    models: Sequence[str],
    shapes: Sequence[str],
    from_model: Path | None,
    tokens: Sequence[int],
    dtypes: Sequence[str],
    rank: int,
    blocks: int,
    granule: int,
) -> list[Layer]:
    """Return the layers that the options name, those of llama-3-8b where they name none."""
    check_choices("--model", models, MODELS)
    check_choices("--dtype", dtypes, KERNEL_PRECISIONS)
    decoders = [MODELS[name] for name in models]
    if from_model is not None:
        decoders.append(read_config(from_model))
    if not decoders and not shapes:
        decoders = [MODELS["llama-3-8b"]]
    sizes = [size for decoder in decoders for size in decoder.shapes] + [parse_shape(text) for text in shapes]
    return [
        Layer(n, c, t, dtype, rank, blocks, granule)
        for n, c in dict.fromkeys(sizes)
        for t in tokens
        for dtype in dtypes
    ]


def device_here() -> torch.device | None:
    """Return the GPU that is tuned: the current one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def dry(layers: Sequence[Layer], kernels: Sequence[str], gpu: str | None, processes: int | None) -> None:
    """Print what would be timed on a published GPU, else on the one that is here, else on an H100."""
    device = device_here()
    if gpu is not None:
        check_choice("--gpu", gpu, GPUS)
    if gpu is None and device is not None:
        target = Target.of(device)
    else:
        target = Target.published(GPUS[gpu or DEFAULT_GPU])
    planned = _plan(layers, kernels, target, processes)
    out = console()
    for job in planned:
        out.print(_plan_table(job))
    timed, pruned = sum(len(job.candidates) for job in planned), sum(len(job.pruned) for job in planned)
    where = f"{len(planned)} problems on {target.gpu.name} ({target.arch})"
    out.print(
        f"{timed} would be timed for {where}, {pruned} are pruned. Nothing was measured.", highlight=False
    )


def measure(
    layers: Sequence[Layer], kernels: Sequence[str], budget: float | None, processes: int | None
) -> None:
    """Tune on the GPU that is here; exits 130 when interrupted, with what was found kept."""
    deadline = None if budget is None else time.monotonic() + 60 * budget
    device = device_here()
    if device is None:
        raise ValueError(
            "there is no CUDA or ROCm GPU here to tune; add --dry-run to list what would be timed on an "
            f"{DEFAULT_GPU}, or on another with --gpu"
        )
    if (obstacle := triton_obstacle(device)) is not None:
        raise ValueError(f"the kernels cannot run here: {obstacle}; smoa-kernels info shows what can")
    path = user_table(identity(device, "forward").gpu)
    known = update(path, ())  # cannot be written? then before anything is compiled
    planned = _plan(layers, kernels, Target.of(device), processes, deadline)
    unfinished = [job for job in planned if left(job, so_far(job, device, known))]

    code, problems, stopped = 0, [], ""
    try:
        with progress_bar("measuring") as bar:
            task = bar.add_task(
                "", total=sum(len(left(job, so_far(job, device, known))) for job in unfinished)
            )

            def progress(job: Job, entry: Entry) -> None:
                bar.advance(task)
                if not left(job, entry):
                    words = f"{unfinished.index(job) + 1}/{len(unfinished)} {_best_words(entry)}"
                    bar.console.print(words, markup=False, highlight=False, soft_wrap=True)

            done = tune(
                planned,
                device=device,
                timer=timer,
                known=known,
                save=keep,
                deadline=deadline,
                progress=progress,
            )
        problems = [tuned for tuned in done if tuned.problem]
    except KeyboardInterrupt:
        code, stopped = 130, "Interrupted: what was found is kept, the same command goes on from here."
    except DeviceLostError as error:
        code, stopped = 1, str(error)
    known = read(path)
    entries = (so_far(job, device, known) for job in planned)
    found = {entry.key: entry for entry in entries if entry.trials}
    console().print(_result_table(planned, found))
    lines = [
        *(f"compared: {line}" for line in describe_algorithms(found.values())),
        *_failures(planned, found),
        *(f"not done: {describe(tuned.job.key)}: {tuned.problem}" for tuned in problems),
        f"Kept in {path}",
    ]
    if stopped or problems:
        lines.append(stopped or "The same command goes on with what is not done.")
    for line in lines:
        typer.echo(line)
    if code:
        raise typer.Exit(code)


def _plan(
    layers: Sequence[Layer],
    kernels: Sequence[str],
    target: Target,
    processes: int | None,
    deadline: float | None = None,
) -> list[Job]:
    """The jobs, what compiles badly pruned; half of the time until the deadline is left for measuring."""
    if target.arch.startswith("gfx") and any(layer.dtype == "tf32" for layer in layers):
        raise ValueError(
            "--dtype tf32 is never asked for on AMD, which multiplies float32 in IEEE: give fp32"
        )
    pairs = {(j.key.kernel, j.key.dtype) for j in jobs(layers, target, kernels=kernels)}
    with progress_of("compiling") as progress:
        ruled_out = broken(
            {pair for pair in pairs if pair[0] in KERNELS},
            target.audited,
            processes=processes,
            deadline=None if deadline is None else (time.monotonic() + deadline) / 2,
            progress=progress,
        )
    return jobs(layers, target, kernels=kernels, ruled_out=ruled_out)


def _best_words(entry: Entry) -> str:
    """The best of an entry in one line."""
    best = winner(entry)
    if best is None or best.seconds is None:
        return f"{describe(entry.key)}: nothing yet"
    return f"{describe(entry.key)}: {best.seconds * 1e6:.1f} µs, {describe_choice(best.choice)}"


def _plan_table(job: Job) -> Table:
    """What would be timed for a problem, what not, and why."""
    table = Table(title=describe(job.key), title_justify="left", show_header=False)
    for choice in job.candidates:
        told = "timed" + (", runs without a table" if choice == job.default else "")
        if isinstance(choice, str) and choice not in admissible(job.key.kernel, job.key.dtype):
            told = "timed to compare, never chosen: a rounded W_eff loses a small update"
        table.add_row(describe_choice(choice), told)
    for choice, reason in job.pruned:
        table.add_row(describe_choice(choice), f"pruned: {reason}", style="dim")
    return table


def _result_table(jobs: Sequence[Job], found: Mapping[Key, Entry]) -> Table:
    """Heuristic against tuned time of every problem that has an entry."""
    table = Table(title="Heuristic against tuned, medians")
    for heading in ("problem", "choice", "tried"):
        table.add_column(heading)
    for heading in ("heuristic µs", "tuned µs", "ratio"):
        table.add_column(heading, justify="right")
    for job in jobs:
        entry = found.get(job.key)
        if entry is None:
            continue
        best, default = winner(entry), entry.trial(job.default)
        before = None if default is None else default.seconds
        after = None if best is None else best.seconds
        table.add_row(
            describe(job.key),
            "-" if best is None else describe_choice(best.choice),
            f"{len(entry.trials)} of {len(job.candidates)}",
            "-" if before is None else f"{before * 1e6:.1f}",
            "-" if after is None else f"{after * 1e6:.1f}",
            "-" if before is None or after is None else f"{after / before:.2f}",
        )
    return table


def _failures(jobs: Sequence[Job], found: Mapping[Key, Entry]) -> Iterator[str]:
    """A line for every candidate that was tried and not timed."""
    for job in jobs:
        for trial in found[job.key].trials if job.key in found else ():
            if trial.seconds is None and trial.reason != INTERRUPTED:
                yield f"failed: {describe(job.key)} at {describe_choice(trial.choice)}: {trial.reason}"
