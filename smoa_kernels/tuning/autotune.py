"""`SMOA_AUTOTUNE=1`: measure what comes up in a training step, on rank 0, and give every rank the same choice.

Only the shipped configurations are tried, which need no audit, and each choice takes seconds once. Rank 0 publishes it,
or what its table has, through the process group's store, where ranks without a table's entry look for it: unlike a
broadcast that cannot hang where ranks see different token counts, and therefore ask for different things.

What is waited for is limited per process, not per problem: ranks that are done wait for the slowest in a collective,
which NCCL gives up after ten minutes.
"""

from __future__ import annotations

import functools
import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist

from ..kernels.entries import Choice, Entry
from ..kernels.heuristic import ALGORITHM_KEYS, Key
from ..kernels.identity import identity, staleness
from ..kernels.lookup import keep, known
from .plan import Target, job
from .tuner import Timer, gpu_timer, tune
from .workloads import Workload, workload

__all__ = ["Budget", "measured"]

SECONDS = 20.0  # for one choice, compilation included; the kernels of an algorithm have theirs before
POLL = 0.1  # a blocking wait would keep the store from this process's other threads

timer: Timer = gpu_timer


class Budget:
    """Seconds that a process may spend on something, in all."""

    def __init__(self, seconds: float) -> None:
        self.left = seconds

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Count the time until the end of the block."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.left -= time.monotonic() - start


measuring = Budget(300.0)  # on rank 0, for which the others wait
waiting = Budget(60.0)  # on another rank, for problems that rank 0 has not come across


@functools.cache
def measured(key: Key, device: torch.device) -> Entry | None:
    """The entry for a key, measured here or on rank 0; None where that failed. Asked once per process and key.

    Args:
        key: the problem.
        device: where to measure, while no CUDA graph is captured on it.
    """
    entry = next(iter(known(key, device)), None)
    if not (dist.is_available() and dist.is_initialized()):
        return _completed(entry, key, device, Budget(SECONDS))
    store = dist.distributed_c10d._get_default_store()
    name = "smoa-autotune " + json.dumps(key)
    if dist.get_rank() != 0:
        return entry if entry is not None and entry.complete else _published(store, name, key, device)
    store.set(f"{name} asked", "")
    try:
        entry = _completed(entry, key, device, measuring)
    finally:
        store.set(f"{name} found", json.dumps(None if entry is None else entry.to_json()))
    return entry


def _published(store: Any, name: str, key: Key, device: torch.device) -> Entry | None:
    """What rank 0 put into the process group's store, where it is another such GPU."""
    try:
        with waiting.spending():
            asked = _appears(store, f"{name} asked", waiting.left)
        if not asked or not _appears(store, f"{name} found", measuring.left):
            return None
        data = json.loads(store.get(f"{name} found"))
    except RuntimeError:  # the store went with rank 0
        return None
    entry = None if data is None else Entry.from_json(data)
    return None if entry is None or staleness(entry.identity, identity(device, key.kernel)) else entry


def _appears(store: Any, name: str, seconds: float) -> bool:
    """Wait for a name in the store; where no seconds are left, look once."""
    end = time.monotonic() + seconds
    while not store.check([name]):
        if time.monotonic() >= end:
            return False
        time.sleep(POLL)
    return True


def _completed(entry: Entry | None, key: Key, device: torch.device, budget: Budget) -> Entry | None:
    """An entry of the tables, or none, with what it lacks measured as far as the time goes."""
    if entry is not None and entry.complete:
        return entry
    if budget.left <= 0:
        _warn(f"the time of this run is spent; {key.kernel} is measured in the next one")
        return entry
    try:
        planned, load = job(key, Target.of(device)), workload(key, device)
        if key.kernel in ALGORITHM_KEYS:
            _measure_kernels(load, planned.candidates)
        with budget.spending():
            (tuned,) = tune(
                [planned],
                device=device,
                timer=timer,
                known={} if entry is None else {(key, entry.identity): entry},
                save=lambda entry: None,  # once, at the end
                deadline=time.monotonic() + min(SECONDS, budget.left),
                operands=lambda key, device: load,
            )
    except Exception as error:  # memory for the operands, say: the step goes on
        _warn(f"{key.kernel} keeps its default: {error}")
        return entry
    if tuned.entry is None or tuned.entry.best() is None:
        return entry
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
