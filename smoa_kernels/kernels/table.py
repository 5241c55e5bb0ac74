"""The tuning table: the launch parameters and algorithms that were measured fastest, on disk and in force.

There is a JSON file for each GPU: the user's in the cache folder, which comes first, and a table that may ship
with the package. It holds by `architectures.identity`, which names the GPU and the software, what was measured there:

    {"schema": 3, "machines": {"NVIDIA H100, sm_90, …": {
        "choices": {"permute bf16 blocks=2 …": {"choice": "t=64 p=128 …", "seconds": 1e-05, "refused": {}}},
        "verdicts": {"permute_kernel 5f3a…": ""}}}}

A choice is the name of a candidate. The verdicts on compiled kernels are those of `backends/verified.py`. What other
machines measured stays in the file. A table never stops a run: what cannot be used is named in a warning, and the
heuristic chooses. A file that is not a table is set aside by the next writer.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import torch
from filelock import FileLock

from ..checks import shown
from ..files import cache_folder, replace_file
from .architectures import architecture, gpu_name, identity, multiprocessors
from .spec import ALGORITHM_KEYS, STAND_INS, Config, Kernel, Key

SCHEMA = 3
SHIPPED = Path(__file__).resolve().parent / "tables"

Choice: TypeAlias = Config | str
"""Launch parameters of a kernel, or the name of an algorithm; a table holds its `str`."""

MOST_CACHED = 4096
"""Most results that a function under :func:`cached` keeps: a training may see many buckets of tokens."""

F = TypeVar("F", bound=Callable[..., Any])
_caches: list[Any] = []
_override: Callable[[Key], Choice | None] = lambda key: None  # noqa: E731  # replaced by `override`


def clear_cache() -> None:
    """Read the tables anew, and choose anew."""
    for function in (_tables, *_caches):
        function.cache_clear()


def cached(function: F) -> F:
    """Cache the results of a function, until the table changes, for arguments by position that are plain values.

    If there are too many results, the result that was not used for longest goes.
    """
    _caches.append(lru_cache(MOST_CACHED)(function))
    return cast(F, _caches[-1])


@contextmanager
def override(choose: Callable[[Key], Choice | None]) -> Iterator[None]:
    """Ask `choose` first for each choice meanwhile, in all threads; None leaves it to tables and heuristics."""
    global _override
    before, _override = _override, choose
    clear_cache()
    try:
        yield
    finally:
        _override = before
        clear_cache()


@contextmanager
def chosen_for(tokens: Mapping[int, int]) -> Iterator[None]:
    """Choose for each number of tokens as for the number that it stands for in `tokens`, meanwhile."""
    STAND_INS.update(tokens)
    clear_cache()
    try:
        yield
    finally:
        STAND_INS.clear()
        clear_cache()


def select(kernel: Kernel, key: Key, device: torch.device) -> Config:
    """A kernel's launch parameters: the candidate that was measured fastest, else the heuristic's."""
    choice = _override(key) or _measured(key, kernel.candidates(key, architecture(device)), device)
    if isinstance(choice, Config):
        return choice
    return kernel.default(key, architecture(device), multiprocessors(device))


def fastest(key: Key, device: torch.device) -> str | None:
    """The algorithm that was measured fastest; None if none was. The result is not cached."""
    choice = _override(key) or _measured(key, ALGORITHM_KEYS[key.kernel], device)
    return choice if isinstance(choice, str) else None


def _measured(key: Key, candidates: Sequence[Choice], device: torch.device) -> Choice | None:
    by_name = {str(candidate): candidate for candidate in candidates}
    for path, choices in _tables(device):
        entry = choices.get(str(key))
        name = entry.get("choice") if isinstance(entry, dict) else entry
        if isinstance(name, str) and name in by_name:
            return by_name[name]
        if name is not None:  # it is None while the key is being tuned
            warnings.warn(
                f"tuning table {path}: {key} has no choice {shown(name)}; it is not used", stacklevel=2
            )
    return None


@cache
def _tables(device: torch.device) -> tuple[tuple[Path, dict[str, Any]], ...]:
    paths = user_table(gpu_name(device)), SHIPPED / user_table(gpu_name(device)).name
    tables = {path: read(path) for path in paths}
    for path, table in tables.items():
        if problem := table.problem(identity(device)):
            warnings.warn(f"tuning table {path} {problem}", stacklevel=2)
    return tuple((path, table.part(identity(device), "choices")) for path, table in tables.items())


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
    """Return the path of the user's table for a GPU with this driver's name."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return cache_folder() / "tuning" / f"{name}.json"


def read(path: Path) -> Table:
    """Read a table; an empty table if there is no file."""
    if path.is_fifo():  # reading it would wait for a writer
        return Table({}, "cannot be read: it is a pipe")
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return Table({})
    except OSError as error:
        return Table({}, f"cannot be read: {error}")
    except (ValueError, RecursionError):
        return Table({}, "is not JSON")
    if isinstance(data, dict) and "schema" in data and data["schema"] != SCHEMA:
        return Table({}, f"has schema {shown(data['schema'])}, this version knows {SCHEMA}")
    if not isinstance(data, dict) or not isinstance(data.get("machines"), dict):
        return Table({}, "is not a table of smoa-kernels")
    return Table(data["machines"])


def keep(device: torch.device, name: str, new: Mapping[str, Any]) -> dict[str, Any]:
    """Add to the "choices" or "verdicts" of a device in the user's table; return all of them.

    Writers hold a lock, read the file again, add their results and replace it in one step: two of them lose nothing,
    and a reader never sees half a file. A file that is no table is renamed to `NAME.broken-1` (or -2, …).

    Raises:
        OSError: the folder cannot be written to, another process holds the lock for a minute, or there are verdicts to
            add and the file has another schema: a training step moves no such file.
    """
    path = user_table(gpu_name(device))
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{path.name}.lock"), timeout=60):  # a process that dies releases it
        machines, broken = table = read(path)
        if broken.startswith("cannot be read" if name == "choices" else ("cannot be read", "has schema")):
            raise OSError(broken)
        if broken:
            number = 1
            while (aside := path.with_name(f"{path.name}.broken-{number}")).exists():
                number += 1
            os.replace(path, aside)
            warnings.warn(f"tuning table {path} {broken}; set aside as {aside.name}", stacklevel=2)
        machine, part = machines.get(identity(device)), table.part(identity(device), name) | dict(new)
        machines[identity(device)] = (machine if isinstance(machine, dict) else {}) | {name: part}
        replace_file(path, f"{json.dumps({'schema': SCHEMA, 'machines': machines}, indent=1)}\n".encode())
    if name == "choices":
        clear_cache()
    return part
