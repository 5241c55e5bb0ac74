"""Which measured choice is in force: the user's table, then the shipped one; the heuristic answers for neither.

Tables are read once per process and GPU. An entry that was measured on something else (`identity.staleness`) is not
used. With `SMOA_AUTOTUNE=1` a problem without an entry is measured when it first comes up; without it nothing is ever
timed here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache

import torch

from ..checks import check_kind, check_names
from ..kernels import selection
from ..kernels.heuristic import Key, check_key
from ..kernels.launch import Config
from .entries import Entry
from .identity import identity, staleness
from .store import read, shipped_table, update, user_table

__all__ = ["autotune_wanted", "forget", "install", "keep", "tuned_algorithm", "tuned_config"]

_algorithms: dict[tuple[torch.device, Key], str | None] = {}


def install() -> None:
    """Let launchers ask here before the heuristic.

    Example:
        >>> install()
    """
    selection.prefer(tuned_config)


def forget() -> None:
    """Read the tables again at the next question: one of them has changed.

    Example:
        >>> forget()
    """
    _tables.cache_clear()
    _algorithms.clear()
    selection.forget()


def keep(entry: Entry) -> None:
    """Add an entry to the user's table, in force from now on.

    Args:
        entry: what was measured.

    Raises:
        TypeError: it is none.
        OSError: the table cannot be written.

    Example:
        >>> from smoa_kernels.tuning.entries import Trial
        >>> key, device = Key("forward", "bf16", 8, 2, 4096, 4096, 512), torch.device("cpu")
        >>> trials = (Trial("split", seconds=2e-3), Trial("fused", seconds=1e-3))
        >>> keep(Entry(key, identity(device, "forward"), "split", trials, complete=True))
        >>> tuned_algorithm(key, device, ("split", "fused"))
        'fused'
    """
    check_kind("entry", entry, Entry)
    update(user_table(entry.identity.gpu), [entry])
    forget()


def autotune_wanted() -> bool:
    """Whether the user lets a training step wait for measurements, `SMOA_AUTOTUNE=1`.

    Example:
        >>> autotune_wanted()
        False
    """
    return os.environ.get("SMOA_AUTOTUNE") == "1"


def tuned_config(key: Key, device: torch.device) -> Config | None:
    """Launch parameters measured for a kernel's problem; None where there are none.

    Args:
        key: whose `kernel` is one of `heuristic.CONFIGS`.
        device: of the operands.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Example:
        >>> tuned_config(Key("permute", "bf16"), torch.device("cpu")) is None
        True
    """
    entry = _entry(key, device)
    best = None if entry is None else entry.best()
    return None if best is None or isinstance(best.choice, str) else best.choice


def tuned_algorithm(key: Key, device: torch.device, allowed: Sequence[str]) -> str | None:
    """The algorithm measured fastest among `allowed`; None where none was measured.

    Args:
        key: whose `kernel` is "forward" or "input_gradient".
        device: of the operands.
        allowed: those whose rounding the caller accepts, the same for every call with this key.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Example:
        >>> key = Key("input_gradient", "bf16", 8, 2, 4096, 4096, 512)
        >>> tuned_algorithm(key, torch.device("cpu"), ("merged", "fused")) is None
        True
    """
    try:
        return _algorithms[device, key]
    except (KeyError, TypeError):
        # Not asked yet, or what cannot be hashed: then `_entry` says what it must be.
        pass
    check_names("allowed", allowed)
    entry = _entry(key, device)
    best = None if entry is None else entry.best(allowed)
    _algorithms[device, key] = found = None if best is None else str(best.choice)
    return found


def _entry(key: Key, device: torch.device) -> Entry | None:
    check_key(key)
    now = identity(device, key.kernel)
    for table in _tables(device):
        entry = table.get(key)
        if entry is not None and not staleness(entry.identity, now) and entry.best() is not None:
            return entry
    if autotune_wanted():
        from .autotune import measured  # measures through the backend, which asks here

        return measured(key, device)
    return None


@cache
def _tables(device: torch.device) -> tuple[Mapping[Key, Entry], ...]:
    gpu = identity(device, "forward").gpu
    return read(user_table(gpu)), read(shipped_table(gpu), set_aside=False)
