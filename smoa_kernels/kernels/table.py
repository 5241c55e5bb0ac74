"""The tuning table: the launch parameters and algorithms that were measured fastest, on disk and in force.

A GPU has one JSON file in the user's cache folder. It holds what was measured there by `architectures.identity`, which
names the GPU, the software and the source of the kernels; what is of another identity stays in the file, unused:

    {"NVIDIA H100, sm_90, …": {
        "choices": {"permute bf16 blocks=2 …": {"choice": "t=64 p=128 …", "seconds": 1e-05, "refused": {}}},
        "verdicts": {"permute_kernel 5f3a…": ""}}}

A choice is the name of a candidate; it is null while the key is being tuned. The verdicts on compiled kernels are those
of `backends/verified.py`. A table never stops a run: what cannot be used is named in a warning, and the heuristic
chooses. A file that is not a table is set aside by the next writer.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import torch
from filelock import FileLock

from ..checks import shown
from ..files import cache_folder, replace_file
from .architectures import architecture, gpu_name, identity, multiprocessors
from .spec import STAND_INS, Config, Kernel, Key

Choice: TypeAlias = Config | str
"""Launch parameters of a kernel, or the name of an algorithm; a table holds its `str`."""

MOST_CACHED = 4096
"""Most results that a function under :func:`cached` keeps: a training may see many buckets of tokens."""

F = TypeVar("F", bound=Callable[..., Any])
_caches: list[Any] = []
_generation = 0
_override: Callable[[Key], Choice | None] = lambda key: None  # noqa: E731  # replaced by `override`


def clear_cache() -> None:
    """Read the table anew, and choose anew."""
    global _generation
    _generation += 1
    for function in _caches:
        function.cache_clear()


def generation() -> int:
    """A number that grows with each :func:`clear_cache`, for results that are kept elsewhere."""
    return _generation


def cached(function: F) -> F:
    """Cache the results of a function, until the table changes, for arguments by position that are plain values.

    If there are too many results, the result that was not used for longest goes.
    """
    _caches.append(lru_cache(MOST_CACHED)(function))
    return cast(F, _caches[-1])


@contextmanager
def override(
    choose: Callable[[Key], Choice | None] | None = None, *, tokens: Mapping[int, int] = MappingProxyType({})
) -> Iterator[None]:
    """Choose otherwise meanwhile, in all threads.

    Args:
        choose: is asked first for each choice; None leaves it to the table and the heuristic.
        tokens: numbers of tokens, and for which number to choose in the place of each.
    """
    global _override
    before, _override = _override, choose or _override
    STAND_INS.update(tokens)
    clear_cache()
    try:
        yield
    finally:
        _override = before
        STAND_INS.clear()
        clear_cache()


def select(kernel: Kernel, key: Key, device: torch.device) -> Config:
    """A kernel's launch parameters: the candidate that was measured fastest, else the heuristic's."""
    choice = measured(key, lambda: kernel.candidates(key, architecture(device)), device)
    if isinstance(choice, Config):
        return choice
    return kernel.default(key, architecture(device), multiprocessors(device))


def measured(key: Key, candidates: Callable[[], Sequence[Choice]], device: torch.device) -> Choice | None:
    """The candidate that was measured fastest, or what `override` says; None if there is neither. Not cached."""
    if choice := _override(key):
        return choice
    entry = _choices(device).get(str(key))
    name = entry.get("choice") if isinstance(entry, dict) else entry
    if name is None:
        return None
    choice = next((candidate for candidate in candidates() if str(candidate) == name), None)
    if choice is None:
        path = user_table(gpu_name(device))
        warnings.warn(f"tuning table {path}: {key} has no choice {shown(name)}; it is not used", stacklevel=2)
    return choice


@cached
def _choices(device: torch.device) -> dict[str, Any]:
    path, machine = user_table(gpu_name(device)), identity(device)
    table = read(path)
    if problem := table.problem(machine):
        warnings.warn(f"tuning table {path} {problem}", stacklevel=2)
    return table.part(machine, "choices")


class Table(NamedTuple):
    """The contents of a table's file."""

    machines: dict[str, Any]  # by identity, as the file has it
    broken: str = ""  # why the file is not a table; empty if it is a table

    def part(self, machine: str, name: str) -> dict[str, Any]:
        """The "choices" or "verdicts" of a machine; none if they are damaged."""
        parts = self.machines.get(machine)
        part = parts.get(name) if isinstance(parts, dict) else None
        return part if isinstance(part, dict) else {}

    def problem(self, machine: str) -> str:
        """What cannot be used on a machine, in a sentence; empty if all can."""
        if self.broken:
            return f"{self.broken}; it is not used"
        if any(self.part(other, "choices") for other in self.machines) and not self.part(machine, "choices"):
            return "was measured with another GPU, Triton or version of the kernels; `smoa-kernels tune` measures anew"
        return ""


def user_table(gpu: str) -> Path:
    """Return the path of the table for a GPU with this driver's name."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return cache_folder() / "tuning" / f"{name}.json"


def read(path: Path) -> Table:
    """Read a table; an empty table if there is no file."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return Table({})
    except OSError as error:
        return Table({}, f"cannot be read: {error}")
    except (ValueError, RecursionError):
        return Table({}, "is not JSON")
    return Table(data) if isinstance(data, dict) else Table({}, "is not a table of smoa-kernels")


def keep(device: torch.device, name: str, new: Mapping[str, Any]) -> dict[str, Any]:
    """Add to the "choices" or "verdicts" of a device in its table; return all of them.

    Writers hold a lock, read the file again, add their results and replace it in one step: two of them lose nothing,
    and a reader never sees half a file. A file that is no table is renamed to `NAME.broken`.

    Raises:
        OSError: the folder or the file cannot be read or written, or another process holds the lock for a minute.
    """
    path, machine = user_table(gpu_name(device)), identity(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{path.name}.lock"), timeout=60):  # a process that dies releases it
        machines, broken = table = read(path)
        if broken.startswith("cannot be read"):
            raise OSError(broken)
        if broken:
            aside = path.with_suffix(".broken")
            os.replace(path, aside)
            warnings.warn(f"tuning table {path} {broken}; set aside as {aside.name}", stacklevel=2)
        part, parts = table.part(machine, name) | dict(new), machines.get(machine)
        machines[machine] = (parts if isinstance(parts, dict) else {}) | {name: part}
        replace_file(path, f"{json.dumps(machines, indent=1)}\n".encode())
    if name == "choices":
        clear_cache()
    return part
