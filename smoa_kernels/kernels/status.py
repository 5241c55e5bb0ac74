"""What `smoa-kernels info` says of the tables: which are in force here, and which entries are stale and why."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from . import store
from .identity import identity, slug, staleness
from .store import read, user_folder

__all__ = ["table_states"]


def table_states(devices: Sequence[torch.device]) -> dict[str, str]:
    """Every table on disk, the user's first, as lookups take them, to its state in words.

    Args:
        devices: that are here.
    """
    states: dict[str, str] = {}
    here = {slug(identity(device, "forward").gpu): device for device in devices}
    seen = set()
    for owner, folder in (("yours", user_folder()), ("shipped", store.SHIPPED)):
        for path in sorted(folder.glob("*.json")):
            states[str(path)] = f"{owner}; {_state(path, here.get(path.stem))}"
            seen.add(path.stem)
        for path in sorted(folder.glob("*.broken-*")):
            states[str(path)] = f"{owner}; set aside, not used"
    for name, device in here.items():
        if name not in seen:
            states[str(device)] = "no table: the heuristic chooses; smoa-kernels tune measures"
    return states


def _state(path: Path, device: torch.device | None) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        entries = read(path, set_aside=False)
    if caught:
        return str(caught[0].message)
    if device is None:
        return f"{len(entries)} entries, for a GPU that is not here"
    reasons = Counter(
        reason
        for entry in entries.values()
        for reason in staleness(entry.identity, identity(device, entry.key.kernel))
    )
    stale = sum(
        bool(staleness(entry.identity, identity(device, entry.key.kernel))) for entry in entries.values()
    )
    words = f"{len(entries) - stale} of {len(entries)} entries in force"
    unfinished = sum(not entry.complete for entry in entries.values())
    if unfinished:
        words += f", {unfinished} not finished"
    if stale:
        told = "; ".join(f"{reason} ({count})" for reason, count in sorted(reasons.items()))
        words += f", {stale} stale: {told}"
    return words
