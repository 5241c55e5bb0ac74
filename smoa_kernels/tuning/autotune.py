"""`SMOA_AUTOTUNE=1`: measure, in a training step, what no table has; the triton backend hooks it into the table.

Only the shipped configurations are tried, which need no audit. Every rank measures for itself, under one cap for the
whole process: ranks that are done wait for the slowest in a collective, which NCCL gives up after ten minutes.
"""

from __future__ import annotations

import time
import warnings

import torch

from ..kernels.spec import Key
from ..kernels.table import Entry, Table, keep
from .plan import Target, job
from .tuner import Timer, gpu_timer, tune

__all__ = ["measure"]

SECONDS = 300.0  # of one process, compilation included

timer: Timer = gpu_timer
_spent = 0.0
_deadline: float | None = None  # while something is measured


def measure(key: Key, device: torch.device, begun: Entry | None) -> Entry | None:
    """Measure a key and keep what was found; return None, with a warning, where nothing was.

    `begun` is what an earlier run found, which is not measured again.
    """
    global _spent, _deadline
    start, spent, outer = time.monotonic(), _spent, _deadline
    if spent >= SECONDS:
        _warn(f"the {SECONDS:.0f} s of this run are spent; what else comes up is measured in the next one")
        return None
    # An algorithm is run, and checked, before it is timed: there its kernels come up, and are measured before it.
    _deadline = start + SECONDS - spent if outer is None else outer
    try:
        (tuned,) = tune(
            [job(key, Target.of(device))],
            device=device,
            timer=timer,
            known=Table({} if begun is None else {(key, begun.identity): begun}),
            save=lambda entry: None,  # once, at the end
            deadline=_deadline,
        )
    except Exception as error:  # a GPU that is lost, say; the step may still go on
        _warn(f"{key.kernel} keeps its default: {error}")
        return None
    finally:
        _deadline = outer
        _spent = spent + time.monotonic() - start  # with what was spent on its kernels
    if tuned.entry is None or tuned.entry.best() is None:
        _warn(f"{key.kernel} keeps its default: {tuned.problem or 'no candidate could be timed'}")
        return None
    try:
        keep(tuned.entry)
    except OSError as error:
        _warn(f"what was found is not kept: {error}")
    return tuned.entry


def _warn(message: str) -> None:
    warnings.warn(f"SMOA_AUTOTUNE: {message}", stacklevel=3)
