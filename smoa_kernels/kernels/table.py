"""The tuning table: the launch parameters and algorithms that were measured fastest, on disk and in force.

There is one JSON file per GPU: the user's in the cache folder, which comes first, and one that may ship with the
package. If neither has measured a problem, the heuristic answers. An entry with another `Identity`, such as another
GPU, stays in the file and is not used. The file also holds the verdicts on compiled kernels (`backends/verified.py`).

A table never stops a run. A bad entry is skipped. A file that is not a table is ignored, and the next writer sets it
aside. Both are named in a warning and in `smoa-kernels info`.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import torch
from filelock import FileLock

from ..checks import check_choice, check_kind, shown
from ..definition.precision import KERNEL_PRECISIONS
from ..files import cache_folder, replace_file
from .architectures import Identity, architecture, identity, multiprocessors
from .spec import ALGORITHM_KEYS, STAND_INS, Config, Kernel, Key

SCHEMA = 2
SHIPPED = Path(__file__).resolve().parent / "tables"

Choice: TypeAlias = Config | str
"""Launch parameters of a kernel, or the name of an algorithm."""

MOST_CACHED = 4096
"""Most results that one function under :func:`cached` keeps: a training may see many buckets of tokens."""

F = TypeVar("F", bound=Callable[..., Any])
_caches: list[Any] = []
_override: Callable[[Key], Choice | None] = lambda key: None  # noqa: E731  # replaced by `override`


def clear_cache() -> None:
    """Read the tables anew, and choose anew."""
    for function in (_tables, *_caches):
        function.cache_clear()


def cached(function: F) -> F:
    """Cache the results of a function, until the table changes, for arguments by position that are plain values.

    If there are too many results, the one that was not used for longest goes.
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
    """A kernel's launch parameters: the fastest that was measured and is in its search space, else the heuristic's."""
    if isinstance(chosen := _override(key), Config):
        return chosen
    candidates = kernel.candidates(key, architecture(device))
    for found in _measured(key, device):
        if found in candidates:
            return candidates[candidates.index(found)]
        warnings.warn(
            f"tuning table: {kernel.name} has no configuration {found}; it is not used", stacklevel=2
        )
    return kernel.default(key, architecture(device), multiprocessors(device))


def fastest(key: Key, device: torch.device) -> str | None:
    """The algorithm that was measured fastest; None if none was. The result is not cached."""
    chosen = _override(key) or next(_measured(key, device), None)
    return chosen if isinstance(chosen, str) else None


def _measured(key: Key, device: torch.device) -> Iterator[Choice]:
    entries = (table.entries.get(key) for table in _tables(device))
    return (entry.choice for entry in entries if entry is not None and entry.choice is not None)


@cache
def _tables(device: torch.device) -> tuple[Table, ...]:
    now = identity(device)
    paths = user_table(now.gpu), SHIPPED / user_table(now.gpu).name
    tables = tuple(read(path, now) for path in paths)
    for path, table in zip(paths, tables, strict=True):
        if table.problem:
            warnings.warn(f"tuning table {path} {table.problem}", stacklevel=2)
    return tables


@dataclass(frozen=True)
class Entry:
    """The result of tuning one problem on one machine.

    Attributes:
        key: the problem.
        identity: the GPU and software that it was measured with.
        choice: the fastest; None while the problem is being tuned.
        seconds: its median time.
        refused: why a candidate is not tried again, by its name.
    """

    key: Key
    identity: Identity
    choice: Choice | None = None
    seconds: float | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain data; :meth:`from_json` is its inverse."""
        choice = self.choice.to_json() if isinstance(self.choice, Config) else self.choice
        plain = {"key": self.key._asdict(), "identity": asdict(self.identity), "choice": choice}
        return plain | {"seconds": self.seconds, "refused": dict(self.refused)}

    @classmethod
    def from_json(cls, data: Any) -> Entry:
        """Make an entry of plain data from a file, which may hold anything.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: a field is missing or wrong.
        """
        key, choice, seconds = Key(**data["key"]), data["choice"], data["seconds"]
        check_kind("kernel", key.kernel, str)
        check_choice("dtype", key.dtype, KERNEL_PRECISIONS)
        for name, default in Key._field_defaults.items():
            check_kind(name, getattr(key, name), type(default))
        if key.kernel in ALGORITHM_KEYS and choice is not None:
            check_choice("choice", choice, ALGORITHM_KEYS[key.kernel])
        elif choice is not None:
            choice = Config(**choice)
            for name, value in vars(choice).items():
                check_kind(name, value, type(getattr(Config, name)))
        if choice is not None and not (isinstance(seconds, float) and 0 < seconds <= sys.float_info.max):
            raise ValueError(f"seconds must be a positive, finite float, got {shown(seconds)}")
        for name, reason in data["refused"].items():
            check_kind(f"the reason of {shown(name)}", reason, str)
        entry = cls(key, Identity(**data["identity"]), choice, seconds, data["refused"])
        if entry.to_json() != data:
            raise ValueError("a field is unknown, or of another type")
        return entry


@dataclass
class Table:
    """The contents of a table's file.

    Attributes:
        entries: the entries in force, by problem.
        verdicts: by versions of the software, for each compiled kernel why it is refused; empty if it is verified.
        stale: entries with another identity, as they were read. They stay in the file.
        skipped: for each bad entry the reason, and the entry as it was read. They stay in the file too.
        broken: why the file is not a table; empty if it is one.
    """

    entries: dict[Key, Entry] = field(default_factory=dict)
    verdicts: dict[str, dict[str, str]] = field(default_factory=dict)
    stale: list[Any] = field(default_factory=list)
    skipped: list[tuple[str, Any]] = field(default_factory=list)
    broken: str = ""

    @property
    def problem(self) -> str:
        """What cannot be used, in a sentence; empty if all can."""
        if self.broken:
            return f"{self.broken}; it is not used"
        if self.skipped:
            more = f"; and {len(self.skipped) - 5} more" if len(self.skipped) > 5 else ""
            return (
                f"has {len(self.skipped)} bad entries: {'; '.join(why for why, _ in self.skipped[:5])}{more}"
            )
        if self.stale and not self.entries:
            return "was measured with another GPU, Triton or version of the kernels; `smoa-kernels tune` measures anew"
        return ""


def user_table(gpu: str) -> Path:
    """Return the path of the user's table for a GPU with this driver's name."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return cache_folder() / "tuning" / f"{name}.json"


def read(path: Path, now: Identity) -> Table:
    """Read a table; an empty one if there is no file. Its attributes name all that cannot be used.

    Args:
        path: of the file.
        now: the identity that entries must have to be in force.
    """
    if path.is_fifo():  # reading it would wait for a writer
        return Table(broken="cannot be read: it is a pipe")
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return Table()
    except OSError as error:
        return Table(broken=f"cannot be read: {error}")
    except (ValueError, RecursionError):
        return Table(broken="is not JSON")
    if not isinstance(data, dict) or not isinstance(data.get("entries"), list):
        return Table(broken="is not a table of smoa-kernels")
    if data.get("schema") != SCHEMA:
        return Table(broken=f"has schema {shown(data.get('schema'))}, this version knows {SCHEMA}")
    table, kept = Table(), data.get("verdicts")
    for versions, forms in kept.items() if isinstance(kept, dict) else ():
        if isinstance(forms, dict) and all(isinstance(reason, str) for reason in forms.values()):
            table.verdicts[versions] = forms
    for number, raw in enumerate(data["entries"], start=1):
        try:
            if raw["identity"] == asdict(now):
                entry = Entry.from_json(raw)
                table.entries[entry.key] = entry
            else:
                table.stale.append(raw)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            # Shortened: the error shows a value, which may be as long as the file.
            why = f"no field {error}" if isinstance(error, KeyError) else str(error)
            table.skipped.append((f"entry {number}: {why}"[:300], raw))
    return table


def keep(now: Identity, *entries: Entry, verdicts: Mapping[str, dict[str, str]] | None = None) -> Table:
    """Add to the user's table; return the table.

    Writers hold a lock, read the file again, add their results and replace it in one step: two of them lose nothing,
    and a reader never sees half a file. Entries that are skipped stay in the file, because another version may know
    them. A file that is no table is renamed to `NAME.broken-1` (or -2, …).

    Args:
        now: the identity of this GPU and software.
        entries: replace those of their keys.
        verdicts: see :class:`Table`.

    Raises:
        OSError: the folder cannot be written to, another process holds the lock for a minute, or there are only
            verdicts to add and the file has another schema.
    """
    path = user_table(now.gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{path.name}.lock"), timeout=60):  # a process that dies releases it
        table = read(path, now)
        # A training step, which adds verdicts, moves no such file.
        foreign = table.broken.startswith("has schema") and verdicts is not None
        if table.broken.startswith("cannot be read") or foreign:
            raise OSError(table.broken)
        if table.broken:
            number = 1
            while (aside := path.with_name(f"{path.name}.broken-{number}")).exists():
                number += 1
            os.replace(path, aside)
            warnings.warn(f"tuning table {path} {table.broken}; set aside as {aside.name}", stacklevel=2)
            table = Table()
        table.entries |= {entry.key: entry for entry in entries}
        for versions, forms in (verdicts or {}).items():
            table.verdicts[versions] = table.verdicts.get(versions, {}) | forms
        plain = [entry.to_json() for entry in table.entries.values()]
        plain += table.stale + [raw for _, raw in table.skipped]
        data = {"schema": SCHEMA, "entries": plain, "verdicts": table.verdicts}
        replace_file(path, f"{json.dumps(data, indent=1)}\n".encode())
    if verdicts is None:
        clear_cache()
    return table
