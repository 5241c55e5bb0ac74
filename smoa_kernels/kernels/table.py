"""What is known of the kernels on one GPU, kept on disk: measured choices, and verdicts on forms (`backends/verified`).

There is one JSON file per GPU: the user's in the cache folder, which comes first, and one that may ship with the
package. Where neither has measured a problem, the heuristic answers. What was measured on another `Identity` stays in
the file and is not used.

A table never stops a run. A bad entry is skipped. A file that is no table is not used, and the next writer sets it
aside. Both are named in a warning and in `smoa-kernels info`.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import torch
from filelock import FileLock

from .. import kernels
from ..checks import check_choice, check_kind, shown
from ..definition.precision import KERNEL_PRECISIONS, PRECISIONS, precision_of
from ..files import cache_folder, replace_file
from .architectures import Identity, architecture, facts, identity, multiprocessors
from .spec import ALGORITHM_KEYS, Config, Key, bucket

__all__ = [
    "INTERRUPTED",
    "SCHEMA",
    "SHIPPED",
    "UNFINISHED",
    "Choice",
    "Entry",
    "Table",
    "Trial",
    "answered",
    "fastest",
    "forget",
    "keep",
    "read",
    "remembered",
    "select",
    "user_table",
]

SCHEMA = 2
SHIPPED = Path(__file__).resolve().parent / "tables"

Choice: TypeAlias = Config | str
"""Launch parameters of a kernel, or the name of an algorithm."""

INTERRUPTED = "interrupted"
"""The reason of a trial that Ctrl-C ended: it is tried again."""
UNFINISHED = "did not finish: the process ended while it ran"
"""The reason of a trial while it runs, and for ever if it ends the process: it is not tried again."""


# Which choice is in force

MOST_ANSWERS = 4096
"""To one function under :func:`remembered`: a training may see any number of token counts."""

_remembered: list[Any] = []
F = TypeVar("F", bound=Callable[..., Any])


def forget() -> None:
    """Read the tables anew, and ask anew what depends on them."""
    _tables.cache_clear()
    for answers in _remembered:
        answers.cache_clear()


def remembered(find: F) -> F:
    """Ask a function once for each of its questions, until the table changes.

    A launch asks for its plan, and a pass for its algorithm, at every call of a layer. Of more questions than are kept
    the one that was not asked for longest is forgotten.

    Args:
        find: answers by its arguments, which are plain values, and by the table: a tensor's address, say, is none of
            its business. It takes its arguments by position.
    """
    answers = lru_cache(MOST_ANSWERS)(find)
    _remembered.append(answers)
    return cast(F, answers)


def select(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    precision: str = "ieee",
    *,
    tokens: int | None = None,
    **sizes: Any,
) -> Any:
    """Return the launch parameters of `kernel`: those measured fastest for its problem, else the heuristic's.

    Args:
        kernel: one of `KERNELS`; the answer is of its configuration class.
        device: of the operands.
        dtype: of the operands that the kernel multiplies or copies.
        precision: how float32 products round, "tf32" or "ieee".
        tokens: not yet bucketed; None where the kernel sees none.
        sizes: the other fields of `Key`.
    """
    seen = 0 if tokens is None else bucket(tokens)
    name = precision_of(dtype, ieee=precision == "ieee").name
    return _selected(Key(kernel, name, tokens=seen, **sizes), device)


@contextmanager
def answered(answer: Callable[[Key], Choice | None]) -> Iterator[None]:
    """Ask `answer` for each choice meanwhile; where it gives None, the tables and the heuristic answer."""
    global _answer
    before, _answer = _answer, answer
    forget()
    try:
        yield
    finally:
        _answer = before
        forget()


_answer: Callable[[Key], Choice | None] | None = None


@remembered
def _selected(key: Key, device: torch.device) -> Choice:
    default = kernels.KERNELS[key.kernel].default
    return fastest(key, device) or default(key, architecture(device), multiprocessors(device))


def fastest(key: Key, device: torch.device, allowed: Sequence[Choice] | None = None) -> Choice | None:
    """Return the fastest choice, among `allowed` where given; None where none of them was measured.

    It is that of the first entry which timed one, the user's before the shipped one. Nothing is remembered.
    """
    if _answer is not None and (answer := _answer(key)) is not None:
        return answer
    best = (table.entries[key].best(allowed) for table in _tables(device) if key in table.entries)
    return next((trial.choice for trial in best if trial is not None), None)


@cache
def _tables(device: torch.device) -> tuple[Table, ...]:
    now = identity(device)
    paths = user_table(now.gpu), SHIPPED / user_table(now.gpu).name
    tables = tuple(read(path, now) for path in paths)
    for path, table in zip(paths, tables, strict=True):
        if table.broken:
            warnings.warn(f"tuning table {path} {table.broken}; it is not used", stacklevel=2)
        elif table.skipped:
            warnings.warn(f"tuning table {path}: {table.reasons()}; the others are in force", stacklevel=2)
    return tables


# What a table holds


@dataclass(frozen=True)
class Trial:
    """One candidate: the median seconds it took, or the reason why it has none."""

    choice: Choice
    seconds: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Entry:
    """What was found for one problem on one machine.

    Attributes:
        key: the problem.
        identity: what it was measured on.
        trials: everything that was tried.
    """

    key: Key
    identity: Identity
    trials: tuple[Trial, ...] = ()

    def best(self, allowed: Sequence[Choice] | None = None) -> Trial | None:
        """Return the fastest trial, among `allowed` choices where given; None where nothing was timed."""
        timed = [t for t in self.trials if t.seconds is not None and (allowed is None or t.choice in allowed)]
        return min(timed, key=lambda trial: trial.seconds or 0.0, default=None)

    def trial(self, choice: Choice) -> Trial | None:
        """Return what became of a choice; None where it is still to be tried."""
        return next((t for t in self.trials if t.choice == choice and t.reason != INTERRUPTED), None)

    def add(self, *trials: Trial) -> Entry:
        """Return the entry with more trials: the newer of two of one choice, but a time outlives a reason."""
        found = {trial.choice: trial for trial in self.trials}
        for trial in trials:
            older = found.get(trial.choice)
            if older is None or older.seconds is None or trial.seconds is not None:
                found[trial.choice] = trial
        return Entry(self.key, self.identity, tuple(found.values()))

    def to_json(self) -> dict[str, Any]:
        """Return plain data; :meth:`from_json` is its inverse."""
        trials = [
            {"choice": t.choice if isinstance(t.choice, str) else t.choice.to_json()}
            | ({"reason": t.reason} if t.seconds is None else {"seconds": t.seconds})
            for t in self.trials
        ]
        return {"key": self.key._asdict(), "identity": asdict(self.identity), "trials": trials}

    @classmethod
    def from_json(cls, data: Any) -> Entry:
        """Make an entry of plain data that anybody may have written.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: what it lacks, or what is wrong.
        """
        key, identity = Key(**data["key"]), Identity(**data["identity"])
        check_choice("kernel", key.kernel, (*kernels.KERNELS, *ALGORITHM_KEYS))
        check_choice("dtype", key.dtype, KERNEL_PRECISIONS)
        for name, default in Key._field_defaults.items():
            check_kind(name, getattr(key, name), type(default))
        trials = tuple(
            Trial(_choice(key, identity, t["choice"]), t.get("seconds"), t.get("reason"))
            for t in data["trials"]
        )
        for trial in trials:
            check_kind("reason", trial.reason, str if trial.seconds is None else type(None))
            if trial.seconds is not None and not 0 < trial.seconds <= sys.float_info.max:
                raise ValueError(f"seconds must be positive and finite, got {shown(trial.seconds)}")
        entry = cls(key, identity, trials)
        if entry.to_json() != data:
            raise ValueError("a field is unknown, or of another type")
        return entry


def _choice(key: Key, identity: Identity, data: Any) -> Choice:
    """A choice that may be launched: nothing but what ships, and divides the layout, can come from a table."""
    if key.kernel in ALGORITHM_KEYS:
        check_choice("choice", data, ALGORITHM_KEYS[key.kernel])
        return str(data)
    kernel = kernels.KERNELS[key.kernel]
    for config in kernel.shipped(facts(identity.capability), PRECISIONS[key.dtype]):
        if config.to_json() == data and kernel.fits(config, key):
            return config
    raise ValueError(f"choice must be a configuration that ships and divides the layout, got {shown(data)}")


@dataclass
class Table:
    """What a file holds.

    Attributes:
        entries: by problem, those that are in force.
        stale: what was measured on something else, as it was read: it stays in the file.
        skipped: why an entry was skipped, and the entry as it was read: likewise.
        verdicts: on the kernels' forms, by the versions that they were found with: why a form is refused, or "".
        broken: why the file is no table; empty where it is one.
    """

    entries: dict[Key, Entry] = field(default_factory=dict)
    verdicts: dict[str, dict[str, str]] = field(default_factory=dict)
    stale: list[Any] = field(default_factory=list)
    skipped: list[tuple[str, Any]] = field(default_factory=list)
    broken: str = ""

    def reasons(self) -> str:
        """Why entries were skipped: five of the reasons, and how many more there are."""
        more = f"; and {len(self.skipped) - 5} more" if len(self.skipped) > 5 else ""
        return f"{len(self.skipped)} skipped: {'; '.join(reason for reason, _ in self.skipped[:5])}{more}"


# Files


def user_table(gpu: str) -> Path:
    """Return the place of the user's table of a GPU, by the driver's name for it."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return cache_folder() / "tuning" / f"{name}.json"


def read(path: Path, now: Identity) -> Table:
    """Read a table; an empty one where there is no file. What cannot be used is named in what is returned.

    Args:
        path: of the file.
        now: what entries must have been measured on to be in force.
    """
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return Table()
    except OSError as error:
        return Table(broken=f"cannot be read: {error}")
    except (ValueError, RecursionError) as error:
        return Table(broken=f"is not JSON ({error})")
    if not isinstance(data, dict) or not isinstance(data.get("entries"), list):
        return Table(broken="is not a table of smoa-kernels")
    if data.get("schema") != SCHEMA:
        return Table(broken=f"has schema {shown(data.get('schema'))}, this version knows {SCHEMA}")
    table = Table(verdicts=data.get("verdicts", {}))
    if not isinstance(table.verdicts, dict) or not all(isinstance(f, dict) for f in table.verdicts.values()):
        return Table(broken="holds no verdicts by versions")
    for number, raw in enumerate(data["entries"], start=1):
        try:
            if raw["identity"] == asdict(now):
                entry = Entry.from_json(raw)
                older = table.entries.get(entry.key)
                table.entries[entry.key] = entry if older is None else older.add(*entry.trials)
            else:
                table.stale.append(raw)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            # Cut, for a value that an error shows may be as long as the file.
            why = f"no field {error}" if isinstance(error, KeyError) else str(error)
            table.skipped.append((f"entry {number}: {why}"[:300], raw))
    return table


def keep(
    now: Identity,
    key: Key | None = None,
    *trials: Trial,
    verdicts: Mapping[str, dict[str, str]] | None = None,
) -> Table:
    """Add to the user's table; return the table.

    Writers hold a lock, read the file again, add their results and replace it in one step: two of them lose nothing,
    and a reader never sees half a file. Entries that are skipped stay in the file, because another version may know
    them. A file that is no table is renamed to `NAME.broken-1` (or -2, …).

    Args:
        now: the identity of GPU and software of the trials.
        key: the problem of the trials, which are in force from now on; None adds none.
        trials: see :meth:`Entry.add`.
        verdicts: see :class:`Table`.

    Raises:
        OSError: the folder cannot be written to, or another process holds the lock for a minute.
    """
    path = user_table(now.gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{path.name}.lock"), timeout=60):  # a process that dies releases it
        found = read(path, now)
        if found.broken.startswith("cannot be read"):
            raise OSError(found.broken)
        if found.broken:
            number = 1
            while (aside := path.with_name(f"{path.name}.broken-{number}")).exists():
                number += 1
            os.replace(path, aside)
            warnings.warn(f"tuning table {path} {found.broken}; set aside as {aside.name}", stacklevel=2)
            found = Table()
        if key is not None:
            found.entries[key] = found.entries.get(key, Entry(key, now)).add(*trials)
        for versions, forms in (verdicts or {}).items():
            found.verdicts[versions] = found.verdicts.get(versions, {}) | forms
        entries = [entry.to_json() for entry in found.entries.values()]
        entries += found.stale + [raw for _, raw in found.skipped]
        data = {"schema": SCHEMA, "entries": entries, "verdicts": found.verdicts}
        replace_file(path, f"{json.dumps(data, indent=1)}\n".encode())
    if verdicts is None:
        forget()
    return found
