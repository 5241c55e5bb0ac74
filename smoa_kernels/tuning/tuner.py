"""The loop that tunes: check each candidate, time it, save what was found, go on where an earlier run stopped.

Two promises hold. Ctrl-C keeps what was found. A candidate that ends the process is not tried for ever: it is saved as
unfinished before it runs, and whatever comes after replaces that. Triton's own autotuner compares no numbers with
anything, times no algorithm that is made of several kernels, and tries a candidate that kills the process again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from ..checks import first_line
from ..kernels.identity import identity
from ..kernels.launch import on_device
from ..kernels.spec import Key
from ..kernels.table import INTERRUPTED, UNFINISHED, Choice, Entry, Table, Trial
from .workloads import Workload, workload

__all__ = [
    "DeviceLostError",
    "Job",
    "Run",
    "Timer",
    "Tuned",
    "gpu_timer",
    "left",
    "so_far",
    "tune",
]


MOST_CHARACTERS = 400  # of a reason: a compiler's may be as long as its source


@dataclass(frozen=True)
class Run:
    """One candidate, ready to be timed: call it to launch it."""

    choice: Choice
    launch: Callable[[], object]

    def __call__(self) -> object:
        """Launch once."""
        return self.launch()


Timer = Callable[[Run], float]
"""Median seconds of a run."""


@dataclass(frozen=True)
class Job:
    """One key with what to try for it, and what was ruled out before anything ran.

    Attributes:
        key: the problem.
        default: what would run without tuning; tried first.
        candidates: all that may be timed, the default among them.
        pruned: choice to the reason why it is not timed.
    """

    key: Key
    default: Choice
    candidates: tuple[Choice, ...]
    pruned: tuple[tuple[Choice, str], ...] = ()


@dataclass(frozen=True)
class Tuned:
    """What became of one job: its entry, or why there is none."""

    job: Job
    entry: Entry | None
    problem: str | None = None


class DeviceLostError(RuntimeError):
    """A candidate took the GPU's context with it: nothing more can run in this process."""


def gpu_timer(run: Run) -> float:
    """Measure the median seconds with Triton's own benchmark, which clears the L2 cache before each launch."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=10, rep=50, return_mode="median")) / 1e3


def tune(
    jobs: Sequence[Job],
    *,
    device: torch.device,
    timer: Timer,
    known: Table,
    save: Callable[[Entry], object],
    deadline: float | None = None,
    progress: Callable[[Job, Entry], object] = lambda job, entry: None,
) -> list[Tuned]:
    """Tune jobs in order until the deadline; what is done and not stale is not done again.

    Args:
        jobs: kernels before the algorithms that are made of them.
        device: where to run.
        timer: :func:`gpu_timer`, or a scripted one.
        known: entries of earlier runs.
        save: called with an entry of one trial, before it runs and when it has ended: adds it to the table.
        deadline: by `time.monotonic()`; None knows no end.
        progress: called after each trial with the entry so far.

    Raises:
        KeyboardInterrupt: what was found is saved.
        DeviceLostError: likewise; a second run skips the candidate.
    """
    done = []
    for job in jobs:
        entry = so_far(job, device, known)
        if entry.complete and not left(job, entry):
            done.append(Tuned(job, entry))
            continue
        if deadline is not None and time.monotonic() >= deadline:
            done.append(Tuned(job, entry if entry.trials else None, "no time was left"))
            continue
        try:
            with on_device(device):
                load = workload(job.key, device)
                done.append(_tune_one(job, entry, load, timer, save, deadline, progress))
        except (DeviceLostError, KeyboardInterrupt):
            raise
        except Exception as error:  # operands that do not fit in memory, say: the other jobs go on
            done.append(Tuned(job, None, _reason(error)))
    return done


def so_far(job: Job, device: torch.device, known: Table) -> Entry:
    """Return the entry of an earlier run that holds for a job on this device, else one without trials."""
    now = identity(device, job.key.kernel)
    return known.entries.get((job.key, now)) or Entry(job.key, now, job.default)


def left(job: Job, entry: Entry) -> list[Choice]:
    """Return the candidates that are still to be tried."""
    return [choice for choice in job.candidates if entry.trial(choice) is None]


def _tune_one(
    job: Job,
    entry: Entry,
    load: Workload,
    timer: Timer,
    save: Callable[[Entry], object],
    deadline: float | None,
    progress: Callable[[Job, Entry], object],
) -> Tuned:
    with load.precision():
        load.prepare()
    for choice in left(job, entry):
        if deadline is not None and time.monotonic() >= deadline:
            return Tuned(job, entry, "no time was left for all candidates")
        # Only the new trial is saved: another process may know more of the others than was read at the start.
        trial = Trial(choice, reason=INTERRUPTED)
        try:
            # What ends the process leaves this behind, and is not tried again.
            save(replace(entry, trials=(Trial(choice, reason=UNFINISHED),)))
            trial = _try(choice, load, timer)
            save(replace(entry, trials=(trial,)))
        except BaseException:
            with suppress(Exception):  # what ended the loop is what the caller must hear of
                save(replace(entry, trials=(trial,)))
            raise
        entry = entry.add(trial)
        progress(job, entry)
        _check_device(load, choice)
    entry = replace(entry, complete=True)
    save(replace(entry, trials=()))
    return Tuned(job, entry)


def _try(choice: Choice, load: Workload, timer: Timer) -> Trial:
    try:
        with load.precision():
            load.check(choice)
            return Trial(choice, seconds=timer(Run(choice, lambda: load.run(choice))))
    except Exception as error:  # whatever a compiler or a driver throws is a finding about this choice
        return Trial(choice, reason=_reason(error))


def _check_device(load: Workload, choice: Choice) -> None:
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise DeviceLostError(
            f"{load.key.kernel} at {choice} took the GPU's context with it ({_reason(error)}); what was found is "
            "saved, run the same command again to go on without it"
        ) from error


def _reason(error: BaseException) -> str:
    line = first_line(error).strip()[:MOST_CHARACTERS]
    return f"{type(error).__name__}: {line}".removeprefix("WrongNumbersError: ")
