"""The tuning table: the launch parameters and algorithms that were measured fastest, on disk and in force.

It also holds the verdicts on compiled kernels (`backends/verified.py`).

There is one JSON file per GPU: the user's in the cache folder, which comes first, and one that may ship with the
package. If neither has measured a problem, the heuristic answers. An entry with another `Identity`, such as another
GPU, stays in the file and is not used.

A table never stops a run. A bad entry is skipped. A file that is not a table is ignored, and the next writer sets it
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
from ..definition.precision import KERNEL_PRECISIONS, PRECISIONS
from ..files import cache_folder, replace_file
from .architectures import Identity, architecture, facts, identity, multiprocessors
from .spec import ALGORITHM_KEYS, STAND_INS, Config, Key

SCHEMA = 2
SHIPPED = Path(__file__).resolve().parent / "tables"

Choice: TypeAlias = Config | str
"""Launch parameters of a kernel, or the name of an algorithm."""

INTERRUPTED = "interrupted"
"""The reason of a trial that something else ended, such as Ctrl-C or a lack of memory: it is tried again."""
UNFINISHED = "did not finish: the process ended while it ran"
"""The reason of a trial while it runs. If it ends the process, the reason stays, and it is not tried again."""


# Which choice is in force

MOST_ANSWERS = 4096
"""Most answers that one function under :func:`remembered` keeps: a training may see many token counts."""

_remembered: list[Any] = []
F = TypeVar("F", bound=Callable[..., Any])


def forget() -> None:
    """Forget the tables, and every answer that depends on them."""
    for answers in (_tables, *_remembered):
        answers.cache_clear()


def remembered(find: F) -> F:
    """Cache the results of a function until the table changes.

    A launch asks for its plan, and a pass for its algorithm, at every call of a layer. If there are too many results,
    the one that was not used for longest is forgotten.

    Args:
        find: a function whose result depends only on its arguments, which are plain values, and on the table. It takes
            its arguments by position.
    """
    answers = lru_cache(MOST_ANSWERS)(find)
    _remembered.append(answers)
    return cast(F, answers)


def select(key: Key, device: torch.device) -> Config:
    """Return a kernel's launch parameters: those measured fastest for its problem, else the heuristic's."""
    default = kernels.KERNELS[key.kernel].default
    found = fastest(key, device) or default(key, architecture(device), multiprocessors(device))
    return cast(Config, found)


@contextmanager
def chosen_for(tokens: Mapping[int, int]) -> Iterator[None]:
    """Choose for each number of tokens as for the number that it stands for in `tokens`, meanwhile."""
    STAND_INS.update(tokens)
    forget()
    try:
        yield
    finally:
        STAND_INS.clear()
        forget()


@contextmanager
def answered(answer: Callable[[Key], Choice | None]) -> Iterator[None]:
    """Ask `answer` for each choice meanwhile; where it gives None, the tables and the heuristic answer.

    It answers the launches of all threads, so the process must do nothing else.
    """
    global _answer
    before, _answer = _answer, answer
    forget()
    try:
        yield
    finally:
        _answer = before
        forget()


_answer: Callable[[Key], Choice | None] | None = None


def fastest(key: Key, device: torch.device, allowed: Sequence[Choice] | None = None) -> Choice | None:
    """Return the fastest choice, among `allowed` if given; None if none was measured. The result is not cached.

    It is that of the first entry that timed one, the user's before the shipped one.
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


# Entries


@dataclass(frozen=True)
class Trial:
    """One candidate: its median seconds, or the reason why it has none."""

    choice: Choice
    seconds: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Entry:
    """The trials of one problem on one machine.

    Attributes:
        key: the problem.
        identity: the GPU and software of the trials.
        trials: all candidates that were tried.
    """

    key: Key
    identity: Identity
    trials: tuple[Trial, ...] = ()

    def best(self, allowed: Sequence[Choice] | None = None) -> Trial | None:
        """Return the fastest trial, among `allowed` choices if given; None if nothing was timed."""
        timed = [t for t in self.trials if t.seconds is not None and (allowed is None or t.choice in allowed)]
        return min(timed, key=lambda trial: trial.seconds or 0.0, default=None)

    def trial(self, choice: Choice) -> Trial | None:
        """Return the trial of a choice; None if it is still to be tried."""
        return next((t for t in self.trials if t.choice == choice and t.reason != INTERRUPTED), None)

    def add(self, *trials: Trial) -> Entry:
        """Return the entry with more trials. Of two trials of a choice the newer stays, but a time beats a reason."""
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
        """Make an entry of plain data from a file, which may hold anything.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: a field is missing or wrong.
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
    """Check a choice: only an algorithm, or a configuration that ships, may be launched."""
    if key.kernel in ALGORITHM_KEYS:
        check_choice("choice", data, ALGORITHM_KEYS[key.kernel])
        return str(data)
    kernel = kernels.KERNELS[key.kernel]
    for config in kernel.shipped(facts(identity.capability), PRECISIONS[key.dtype]):
        if config.to_json() == data:
            return config
    raise ValueError(f"choice must be a configuration that ships, got {shown(data)}")


@dataclass
class Table:
    """The contents of a table's file.

    Attributes:
        entries: the entries in force, by problem.
        stale: entries with another identity, as they were read. They stay in the file.
        skipped: for each bad entry the reason, and the entry as it was read. They stay in the file too.
        verdicts: by versions of the software, for each compiled kernel why it is refused; empty if it is verified.
        broken: why the file is not a table; empty if it is one.
    """

    entries: dict[Key, Entry] = field(default_factory=dict)
    verdicts: dict[str, dict[str, str]] = field(default_factory=dict)
    stale: list[Any] = field(default_factory=list)
    skipped: list[tuple[str, Any]] = field(default_factory=list)
    broken: str = ""

    def reasons(self) -> str:
        """Say why entries were skipped: the first five reasons, and the number of the others."""
        more = f"; and {len(self.skipped) - 5} more" if len(self.skipped) > 5 else ""
        return f"{len(self.skipped)} skipped: {'; '.join(reason for reason, _ in self.skipped[:5])}{more}"


# Files


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
    except (ValueError, RecursionError) as error:
        return Table(broken=f"is not JSON ({error})")
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
                older = table.entries.get(entry.key)
                table.entries[entry.key] = entry if older is None else older.add(*entry.trials)
            else:
                table.stale.append(raw)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            # Shortened: the error shows a value, which may be as long as the file.
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
        OSError: the folder cannot be written to, another process holds the lock for a minute, or there are only
            verdicts to add and the file has another schema.
    """
    path = user_table(now.gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{path.name}.lock"), timeout=60):  # a process that dies releases it
        found = read(path, now)
        # A training step, which adds verdicts, moves no such file.
        foreign = found.broken.startswith("has schema") and verdicts is not None
        if found.broken.startswith("cannot be read") or foreign:
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
