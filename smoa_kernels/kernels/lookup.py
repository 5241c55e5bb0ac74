"""Which measured choice is in force: the user's table, then the shipped one; the heuristic answers for neither.

Tables are read once per process and GPU. An entry that was measured on something else, by its `Identity`, is not used.
With `SMOA_AUTOTUNE=1` a problem without a complete entry is measured when it first comes up; without it nothing is ever
timed here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache

import torch

from ..checks import check_kind, check_names
from . import selection
from .entries import Entry, Trial
from .heuristic import Key, check_key
from .identity import identity
from .launch import Config
from .store import Table, read, shipped_table, update, user_table

__all__ = ["autotune_wanted", "forget", "install", "keep", "known", "tuned_algorithm", "tuned_config"]

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
        >>> from smoa_kernels.kernels.entries import Trial
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
    best = _best(key, device, None)
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
        # Not asked yet, or what cannot be hashed: then `known` says what it must be.
        pass
    check_names("allowed", allowed)
    best = _best(key, device, allowed)
    found = None if best is None else str(best.choice)
    if not selection.capturing():
        _algorithms[device, key] = found
    return found


def known(key: Key, device: torch.device) -> list[Entry]:
    """The entries of both tables that hold for a problem here, the user's first.

    Args:
        key: the problem.
        device: of the operands.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Example:
        >>> known(Key("permute", "bf16"), torch.device("cpu"))
        []
    """
    check_key(key)
    now = identity(device, key.kernel)
    return [table[key, now] for table in _tables(device) if (key, now) in table]


def _best(key: Key, device: torch.device, allowed: Sequence[str] | None) -> Trial | None:
    """The fastest of the first entry that timed something allowed."""
    entries = known(key, device)
    if autotune_wanted() and not selection.capturing():
        from ..tuning.autotune import measured  # measures through the backend, which asks here

        # Asked even where the table answers: the other ranks hear of it.
        shared = measured(key, device)
        if shared is not None and not any(entry.complete for entry in entries[:1]):
            entries.insert(0, shared)
    best = (entry.best(allowed) for entry in entries)
    return next((trial for trial in best if trial is not None), None)


@cache
def _tables(device: torch.device) -> tuple[Table, ...]:
    gpu = identity(device, "forward").gpu
    return read(user_table(gpu)), read(shipped_table(gpu), set_aside=False)
