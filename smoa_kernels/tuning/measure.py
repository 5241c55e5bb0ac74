"""Times the candidates of each problem on a GPU, checks their numbers, and writes the results to the user's table.

A choice whose numbers are wrong is never timed: they are compared with torch's operators, as on a kernel's first use
(`backends/verified.py`). An exception is recorded against a choice only if its own launch raised it.
After another kernel's failure, or a lack of memory, a later run tries the choice again. Ctrl-C keeps the results so
far. A candidate that ends the process is not tried again: it is saved as unfinished before it runs, and its result
replaces that entry.
"""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from ..backends.probes import ALLOWED, distance
from ..checks import first_line
from ..kernels import KERNELS
from ..kernels.architectures import identity
from ..kernels.launch import Launch, Pointers, heard_by, on_device
from ..kernels.spec import ALGORITHM_KEYS, Config, Key
from ..kernels.table import INTERRUPTED, UNFINISHED, Choice, Entry, Trial, answered, keep
from .passes import passes
from .plan import Job, multiplied_in

HANGS_SECONDS = 120.0  # limit of a choice, compilation included
REPEATS = 30
FLUSHED_BYTES = 2**30  # four times the largest last-level cache of a GPU, 256 MiB (MI300X)
MOST_CHARACTERS = 400  # of a reason: a compiler's message may contain the whole source

Timer = Callable[[Choice, Callable[[], object]], float]
"""Median seconds of a launch with a choice."""


class DeviceLostError(RuntimeError):
    """A candidate destroyed the GPU's context: nothing more can run in this process."""


class FailedError(RuntimeError):
    """A choice does not run, or its results differ from the definition's."""


@contextmanager
def blamed() -> Iterator[None]:
    """Raise the errors of a block as those of the choice, except for a lack of memory, which says nothing about it."""
    try:
        yield
    except Exception as error:  # any error of a compiler or driver
        if isinstance(error, FailedError) or "out of memory" in str(error).lower():
            raise
        raise FailedError(_reason(error)) from error


def gpu_timer(choice: Choice, launch: Callable[[], object]) -> float:
    """Measure the median seconds of a launch in a CUDA graph; the L2 cache is flushed after each launch.

    Without a graph Python's gaps between launches would count (triton-lang/triton#10149).
    """
    launch()  # compiles
    graph, flush = torch.cuda.CUDAGraph(), torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    with torch.cuda.graph(graph):
        launch()
    seconds: list[float] = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()  # takes longer than the host needs to start the graph
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


@contextmanager
def ended_if_it_hangs(choice: Choice, seconds: float) -> Iterator[None]:
    """End the process if a choice takes longer: nothing else stops a kernel that hangs. It stays unfinished."""

    def end() -> None:
        words = f"{choice} has not ended within {seconds:.0f} s: the process ends, and the choice is not tried again"
        print(f"{words}; run the same command again to go on", file=sys.stderr, flush=True)
        os._exit(1)

    watchdog = threading.Timer(seconds, end)
    watchdog.daemon = True
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()


def tune(
    jobs: Sequence[Job],
    device: torch.device,
    *,
    timer: Timer = gpu_timer,
    deadline: float | None = None,
    progress: Callable[[], object] = lambda: None,
) -> dict[Key, str]:
    """Tune jobs in order until the deadline; jobs that are done and not stale are skipped.

    Args:
        jobs: kernels before the algorithms that use them.
        device: where to run.
        timer: :func:`gpu_timer`, or a scripted one.
        deadline: by `time.monotonic()`; None for no end.
        progress: called after each trial.

    Returns:
        Why a problem, or some of its candidates, was not tried; nothing for those that are done.

    Raises:
        OSError: the table cannot be written.
        KeyboardInterrupt: the results so far are saved.
        DeviceLostError: the results so far are saved, and a second run skips the candidate.
    """
    now = identity(device)
    known, problems = keep(now).entries, dict[Key, str]()
    for job in jobs:
        entry = known.get(job.key) or Entry(job.key, now)
        if not left(job, entry):
            continue
        if deadline is not None and time.monotonic() >= deadline:
            problems[job.key] = "no time was left"
            continue
        try:
            with on_device(device):
                problem = _tune_one(job, entry, workload(job, device), timer, deadline, progress)
        except (DeviceLostError, OSError):
            raise
        except Exception as error:  # for example operands that do not fit in memory: go on with other jobs
            problem = _reason(error)
        if problem:
            problems[job.key] = problem
    return problems


def left(job: Job, entry: Entry | None) -> list[Choice]:
    """Return the candidates that are still to be tried."""
    return [choice for choice in job.candidates if entry is None or entry.trial(choice) is None]


def _tune_one(
    job: Job,
    entry: Entry,
    load: Workload,
    timer: Timer,
    deadline: float | None,
    progress: Callable[[], object],
) -> str:
    """Try the candidates that are left. Returns why some are still left."""
    with multiplied_in(load.precision):
        load.prepare()
    problem = ""
    for choice in left(job, entry):
        if deadline is not None and time.monotonic() >= deadline:
            return problem or "no time was left for all candidates"
        # Only the new trial is saved: another process may have added to the others since they were read.
        trial = Trial(choice, reason=INTERRUPTED)
        try:
            # If the choice ends the process, this entry stays, and it is not tried again.
            keep(entry.identity, job.key, Trial(choice, reason=UNFINISHED))
            try:
                trial = _try(choice, load, timer)
            except Exception as error:  # not of this choice: a later run tries it again
                problem = _reason(error)
            if lost := _lost_device():
                trial = Trial(choice, reason=lost)
            keep(entry.identity, job.key, trial)
        except BaseException:
            with suppress(Exception):  # the caller must get the error that ended the loop
                keep(entry.identity, job.key, trial)
            raise
        if lost:
            raise DeviceLostError(
                f"{job.key.kernel} at {choice} took the GPU's context with it ({lost}); what was found is "
                "saved, run the same command again to go on without it"
            )
        progress()
    return problem


def _try(choice: Choice, load: Workload, timer: Timer) -> Trial:
    try:
        with multiplied_in(load.precision), ended_if_it_hangs(choice, HANGS_SECONDS):
            results, again = load.run(choice)
            load.check(results)
            del results
            with blamed():
                return Trial(choice, seconds=timer(choice, again))
    except FailedError as error:
        return Trial(choice, reason=str(error))


def _lost_device() -> str:
    """Why nothing more can run on the GPU in this process; empty if it can."""
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            return _reason(error)
    return ""


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error).strip()[:MOST_CHARACTERS]}"


# Running and checking


@dataclass(frozen=True)
class Workload:
    """One key's operands and the computations on them.

    Attributes:
        precision: of the operands, one of `precision.KERNEL_PRECISIONS`.
        run: runs with a choice; returns the results, and what is timed.
        expected: the results by torch's operators.
    """

    precision: str
    run: Callable[[Choice], tuple[Sequence[Tensor | None], Callable[[], object]]]
    expected: Callable[[], Sequence[Tensor | None]]

    def prepare(self) -> None:
        """Compute the expected results, once.

        Raises:
            ArithmeticError: torch's operators gave zeros, or numbers that are not finite: they prove nothing.
        """
        distance(tuple(self._expected), tuple(self._expected), 1)

    @cached_property
    def _expected(self) -> Sequence[Tensor | None]:
        return self.expected()

    def check(self, results: Sequence[Tensor | None]) -> None:
        """Raise a FailedError if results differ from the expected ones by more than rounding explains."""
        found = distance(tuple(results), tuple(self._expected), ALLOWED[self.precision])
        if not found <= 1:
            raise FailedError(f"wrong numbers: they differ by {found:.3g} times what rounding explains")


class _Tried(Config):
    """Launch parameters that are tried. Their type marks the launches of the key that they are tried for."""


def workload(job: Job, device: torch.device) -> Workload:
    """The operation that looks a job's key up, on operands that are the same at each call.

    An algorithm's key times the whole operation, and so does one of experts, whose partial results torch adds. Another
    kernel's key times its first launch alone, and those that add its partial results.
    """
    operation = passes(job.layer, device)[job.operation]
    whole = job.key.kernel in ALGORITHM_KEYS or job.layer.experts > 0
    adds = KERNELS["sum_partials"].fn

    def run(choice: Choice) -> tuple[Sequence[Tensor | None], Callable[[], object]]:
        tried = choice if isinstance(choice, str) else _Tried(**vars(choice))
        launches: list[Callable[[], object]] = []
        touched: set[int] = set()

        def hear(launch: Launch, pointers: Pointers) -> bool:
            again = partial(launch, **pointers)
            if not isinstance(launch.config, _Tried):
                if launch.kernel is adds and _address(pointers["partials_ptr"]) in touched:
                    launches.append(again)
                return False
            with heard_by(None), blamed():
                again()
            if not launches:
                launches.append(again)
                touched.update(_address(tensor) for tensor in pointers.values())
            return True

        answers = {**job.answers, job.key: tried}
        is_algorithm = isinstance(choice, str)  # every failure of the pass is its own
        with answered(answers.get), heard_by(hear), blamed() if is_algorithm else nullcontext():
            results = operation.run()
        if not (whole or launches):
            raise LookupError(f"the pass launched no {job.key.kernel}, so there is nothing to time")
        again = partial(run, choice) if whole else lambda: [launch() for launch in launches]
        return results, again

    return Workload(job.layer.precision, run, operation.expected)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
