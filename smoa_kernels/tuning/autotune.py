"""`SMOA_AUTOTUNE=1`: measure, in a training step, what no table has; the triton backend hooks it into the table.

Only the shipped configurations are tried, which need no audit. Every rank measures for itself, under one cap for the
whole process: ranks that are done wait for the slowest in a collective, which NCCL gives up after ten minutes.
"""

from __future__ import annotations

import time
import warnings
from contextlib import suppress

import torch

from ..kernels.heuristic import ALGORITHM_KEYS, Key
from ..kernels.table import Choice, Entry, Table, keep
from .plan import Target, job
from .tuner import Timer, gpu_timer, tune
from .workloads import Workload, workload

__all__ = ["measure"]

SECONDS = 300.0  # of one process, compilation included

timer: Timer = gpu_timer
_spent = 0.0


def measure(key: Key, device: torch.device, begun: Entry | None) -> Entry | None:
    """Measure a key and keep what was found; return None, with a warning, where nothing was.

    Args:
        key: the problem.
        device: where to measure.
        begun: what an earlier run found, which is not measured again.
    """
    global _spent
    if _spent >= SECONDS:
        _warn(f"the {SECONDS:.0f} s of this run are spent; what else comes up is measured in the next one")
        return None
    try:
        planned, load = job(key, Target.of(device)), workload(key, device)
        if key.kernel in ALGORITHM_KEYS:
            _measure_kernels(load, planned.candidates)
        start = time.monotonic()
        try:
            (tuned,) = tune(
                [planned],
                device=device,
                timer=timer,
                known=Table({} if begun is None else {(key, begun.identity): begun}),
                save=lambda entry: None,  # once, at the end
                deadline=start + SECONDS - _spent,
                operands=lambda key, device: load,
            )
        finally:
            _spent += time.monotonic() - start
    except Exception as error:  # memory for the operands, say: the step goes on
        _warn(f"{key.kernel} keeps its default: {error}")
        return None
    if tuned.entry is None or tuned.entry.best() is None:
        _warn(f"{key.kernel} keeps its default: {tuned.problem or 'no candidate could be timed'}")
        return None
    try:
        keep(tuned.entry)
    except OSError as error:
        _warn(f"what was found is not kept: {error}")
    return tuned.entry


def _measure_kernels(load: Workload, algorithms: tuple[Choice, ...]) -> None:
    """Run each algorithm once: its kernels ask for their parameters, and are measured before what they make up."""
    for algorithm in algorithms:
        with suppress(Exception), load.precision():  # what is wrong with it is found when it is timed
            load.run(algorithm)


def _warn(message: str) -> None:
    warnings.warn(f"SMOA_AUTOTUNE: {message}", stacklevel=3)
