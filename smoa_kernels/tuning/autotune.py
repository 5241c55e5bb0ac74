"""`SMOA_AUTOTUNE=1`: measure what comes up in a training step, on rank 0, and give every rank the same choice.

Only the shipped configurations are tried, which need no audit, and each choice takes seconds once. Rank 0 publishes it
through the process group's store, where the others wait for it: unlike a broadcast that cannot hang where ranks see
different token counts, and therefore ask for different things.
"""

from __future__ import annotations

import functools
import json
import time
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..kernels.heuristic import Key
from .entries import Entry
from .identity import identity, staleness
from .lookup import keep
from .plan import Target, job
from .tuner import Timer, gpu_timer, tune_job

__all__ = ["measured"]

SECONDS = 20.0  # for one choice, compilation included
WAIT = timedelta(seconds=60)  # for rank 0's; after that a rank goes by the heuristic

timer: Timer = gpu_timer


@functools.cache
def measured(key: Key, device: torch.device) -> Entry | None:
    """The entry for a key, measured here or on rank 0; None where that failed. Asked once per process and key.

    Args:
        key: the problem.
        device: where to measure; nothing is measured while a CUDA graph is captured on it.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return _measure(key, device)
    store = dist.distributed_c10d._get_default_store()
    name = "smoa-autotune " + json.dumps(key)
    if dist.get_rank() != 0:
        return _published(store, name, key, device)
    entry = None
    try:
        entry = _measure(key, device)
    finally:
        store.set(name, json.dumps(None if entry is None else entry.to_json()))
    return entry


def _published(store: Any, name: str, key: Key, device: torch.device) -> Entry | None:
    """What rank 0 put into the process group's store, where it is another such GPU."""
    try:
        store.wait([name], WAIT)
        data = json.loads(store.get(name))
    except RuntimeError:  # rank 0 was not asked for this key
        return None
    entry = None if data is None else Entry.from_json(data)
    return None if entry is None or staleness(entry.identity, identity(device, key.kernel)) else entry


def _measure(key: Key, device: torch.device) -> Entry | None:
    try:
        deadline = time.monotonic() + SECONDS
        entry = tune_job(job(key, Target.of(device)), device=device, timer=timer, deadline=deadline)
    except RuntimeError as error:
        warnings.warn(f"SMOA_AUTOTUNE: {key.kernel} keeps its default: {error}", stacklevel=2)
        return None
    if entry is None or entry.best() is None:
        return None
    try:
        keep(entry)
    except OSError as error:
        warnings.warn(f"SMOA_AUTOTUNE: what was found is not kept: {error}", stacklevel=2)
    return entry
