"""The table of measured choices: which launch parameters and algorithms are in force, and how they are kept on disk.

There is one JSON file per GPU: the user's in the cache folder, which comes first, and one that may ship with the
package. Where neither has measured a problem, the heuristic answers. An entry that was measured on something else, by
its `Identity`, stays in the file and is not used.

A table never stops a run. A bad entry is skipped, and the others stay in force. A file that is no table is not used,
and the next writer sets it aside. Both are named in a warning and in `smoa-kernels info`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import torch
from filelock import FileLock

from ..checks import check_choice, check_count, check_kind, shown
from ..definition.precision import KERNEL_PRECISIONS, precision_of
from ..files import cache_folder, replace_file
from .architectures import architecture, multiprocessors
from .identity import Identity, identity, staleness
from .sizes import GRANULE, bucket
from .spec import ALGORITHM_KEYS, Config, Kernel, Key

__all__ = [
    "INTERRUPTED",
    "UNFINISHED",
    "Choice",
    "Entry",
    "Table",
    "Trial",
    "check_key",
    "describe",
    "forget",
    "keep",
    "read",
    "remembered",
    "select",
    "states",
    "tuned_algorithm",
    "update",
    "user_table",
]

SCHEMA = 1
SHIPPED = Path(__file__).resolve().parent / "tables"
MOST_BYTES = 16 * 2**20  # thousands of entries

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
    return _selected(
        Key(kernel, precision_of(dtype, ieee=precision == "ieee").name, tokens=seen, **sizes), device
    )


@remembered
def _selected(key: Key, device: torch.device) -> Choice:
    default = _kernels()[key.kernel].default
    return _fastest(key, device) or default(key, architecture(device), multiprocessors(device))


def tuned_algorithm(key: Key, device: torch.device, allowed: Sequence[str]) -> str | None:
    """Return the algorithm measured fastest among `allowed`; None where none was measured. Nothing is kept.

    Args:
        key: the problem; its `kernel` is one of `spec.ALGORITHM_KEYS`.
        device: of the operands.
        allowed: whose rounding the caller accepts, the same at every call with this key.
    """
    return _fastest(key, device, allowed)  # type: ignore[return-value]  # whose choices are algorithms


def keep(entry: Entry) -> None:
    """Add an entry to the user's table, in force from now on.

    Raises:
        OSError: as :func:`update`.
    """
    update(user_table(entry.identity.gpu), [entry])
    forget()  # the table may hold what others wrote meanwhile


def _fastest(key: Key, device: torch.device, allowed: Sequence[str] | None = None) -> Choice | None:
    """The fastest choice of the first entry that timed something allowed, the user's before the shipped one."""
    index = key, identity(device, key.kernel)
    best = (table.entries[index].best(allowed) for table in _tables(device) if index in table.entries)
    return next((trial.choice for trial in best if trial is not None), None)


@cache
def _tables(device: torch.device) -> tuple[Table, ...]:
    name = user_table(identity(device, "forward").gpu)
    return read(name), read(SHIPPED / name.name)


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
        default: what would run without the entry.
        trials: everything that was tried.
        complete: nothing is left to try.
    """

    key: Key
    identity: Identity
    default: Choice
    trials: tuple[Trial, ...] = ()
    complete: bool = False

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
        return replace(self, trials=tuple(found.values()))

    def to_json(self) -> dict[str, Any]:
        """Return plain data; :meth:`from_json` is its inverse."""
        trials = [
            {"choice": _plain(t.choice)}
            | ({"reason": t.reason} if t.seconds is None else {"seconds": t.seconds})
            for t in self.trials
        ]
        return {
            "key": self.key._asdict(),
            "identity": asdict(self.identity),
            "default": _plain(self.default),
            "complete": self.complete,
            "trials": trials,
        }

    @classmethod
    def from_json(cls, data: Any) -> Entry:
        """Make an entry of plain data that anybody may have written.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: what it lacks, or what is wrong.
        """
        key = Key(**data["key"])
        check_key(key)
        trials = tuple(
            Trial(_choice(key, trial["choice"]), _seconds(trial.get("seconds")), trial.get("reason"))
            for trial in data["trials"]
        )
        identity = Identity(**data["identity"])
        check_kind("complete", data["complete"], bool)
        for trial in trials:
            check_kind("reason", trial.reason, str if trial.seconds is None else type(None))
        entry = cls(key, identity, _choice(key, data["default"]), trials, data["complete"])
        if entry.to_json() != data:
            raise ValueError("a field is unknown, or of another type")
        return entry


@dataclass
class Table:
    """What a file holds.

    Attributes:
        entries: by problem and by what they were measured on.
        skipped: why an entry was skipped, and the entry as it was read: it stays in the file.
        broken: why the file is no table; empty where it is one.
    """

    entries: dict[tuple[Key, Identity], Entry] = field(default_factory=dict)
    skipped: list[tuple[str, Any]] = field(default_factory=list)
    broken: str = ""

    def add(self, entry: Entry) -> None:
        """Put an entry in, with the trials of one that is there for the same problem and identity."""
        index = entry.key, entry.identity
        if (older := self.entries.get(index)) is not None:
            complete = older.complete or entry.complete
            entry = replace(entry, trials=older.trials, complete=complete).add(*entry.trials)
        self.entries[index] = entry


# What a field of a configuration may be at most; a launch beyond it fails, which no table may bring about.
_MOST = {"block": 8192, "group_t": 64, "split": 64, "num_warps": 16, "num_stages": 8}
_MOST_TILE = 256


def _seconds(value: Any) -> float | None:
    if value is not None and (type(value) not in (int, float) or not 0 < value <= sys.float_info.max):
        raise ValueError(f"seconds must be positive and finite, got {shown(value)}")
    seconds: float | None = value
    return seconds


def _choice(key: Key, data: Any) -> Choice:
    """A choice that may be launched: its numbers are powers of two, except `split` and `num_stages`."""
    if key.kernel in ALGORITHM_KEYS:
        check_choice("choice", data, ALGORITHM_KEYS[key.kernel])
        return str(data)
    config = _kernels()[key.kernel].config(**data)
    for name, value in vars(config).items():
        if isinstance(getattr(type(config), name, None), bool):  # a switch
            check_kind(name, value, bool)
            continue
        least = 0 if name == "split" and key.kernel == "block_grad" else 1
        least = 16 if name.startswith("block_") else least  # `tl.dot` takes no fewer
        check_count(name, value, least, _MOST.get(name, _MOST_TILE))
        if name not in ("split", "num_stages") and value & (value - 1):
            raise ValueError(f"{name} must be a power of two, got {value}")
    if not _kernels()[key.kernel].fits(config, key):
        raise ValueError(f"{config} does not divide the layout of {key}")
    return config


def _kernels() -> Mapping[str, Kernel]:
    from . import KERNELS  # whose modules import this one

    return KERNELS


def check_key(key: Key) -> None:
    """Check that a choice can be kept for `key`.

    Raises:
        TypeError, ValueError: naming the field, what was given and what is allowed.
    """
    check_choice("kernel", key.kernel, (*_kernels(), *ALGORITHM_KEYS))
    check_choice("dtype", key.dtype, KERNEL_PRECISIONS)
    for name in key._fields[2:-2]:
        check_count(name, getattr(key, name), 0)
    check_kind("transposed", key.transposed, bool)
    check_count("granule", key.granule, 1)
    if key.granule not in (1, GRANULE):
        raise ValueError(f"granule must be 1 or {GRANULE}, got {key.granule}")


def _plain(choice: Choice) -> Any:
    return choice if isinstance(choice, str) else asdict(choice)


# Files


def user_table(gpu: str) -> Path:
    """Return the place of the user's table of a GPU, by the driver's name for it."""
    return cache_folder() / "tuning" / f"{_slug(gpu)}.json"


def read(path: Path) -> Table:
    """Read a table; an empty one where there is no file. What cannot be used is named in one warning."""
    table = _load(path)
    if table.broken:
        warnings.warn(f"tuning table {path} {table.broken}; it is not used", stacklevel=2)
    elif table.skipped:
        warnings.warn(f"tuning table {path}: {_skipped(table)}; the others are in force", stacklevel=2)
    return table


def update(path: Path, entries: Iterable[Entry]) -> Table:
    """Add entries to a table, made where there is none; return what it then holds.

    Writers hold a lock, read the file again, add what they found and replace it in one step: two of them lose nothing,
    and a reader never sees half a file. Entries that are skipped stay in the file, for another version may know them; a
    file that is no table is renamed to `NAME.broken-1` (or -2, …).

    Args:
        path: of the table.
        entries: what was measured; see :meth:`Table.add`.

    Raises:
        OSError: the folder cannot be written to, the table would be larger than any that is read back, or another
            process holds the lock for a minute.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{path.name}.lock"), timeout=60):  # which goes with a process that dies
        table = _parse(path)
        if table.broken:
            _set_aside(path, table.broken)
            table = Table()
        for entry in entries:
            table.add(entry)
        plain = [entry.to_json() for entry in table.entries.values()] + [raw for _, raw in table.skipped]
        text = f"{json.dumps({'schema': SCHEMA, 'entries': plain}, indent=1)}\n".encode()
        if len(text) > MOST_BYTES:
            reason = f"it would hold {len(text)} bytes, more than any table that is read ({MOST_BYTES})"
            raise OSError(errno.EFBIG, reason, str(path))
        replace_file(path, text)
    return table


def _load(path: Path) -> Table:
    try:
        return _parse(path)
    except OSError as error:
        return Table(broken=f"cannot be read: {error}")


def _parse(path: Path) -> Table:
    try:
        found = path.stat()
    except FileNotFoundError:
        return Table()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{path} is not a file")  # a pipe would be waited for
    if found.st_size > MOST_BYTES:
        return Table(broken=f"holds {found.st_size} bytes, more than any table ({MOST_BYTES})")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        return Table(broken=f"is not JSON ({error})")
    schema = data.get("schema") if isinstance(data, dict) else None
    if type(schema) is not int or schema < 1:
        return Table(broken="is not a table of smoa-kernels")
    if schema > SCHEMA:
        return Table(broken=f"has schema {schema}, this version knows up to {SCHEMA}")
    if not isinstance(data.get("entries"), list):
        return Table(broken="holds no list of entries")
    table = Table()
    for number, raw in enumerate(data["entries"], start=1):
        try:
            table.add(Entry.from_json(raw))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            # Cut, for a value that an error shows may be as long as the file.
            why = f"no field {error}" if isinstance(error, KeyError) else str(error)
            table.skipped.append((f"entry {number}: {why}"[:300], raw))
    return table


def _set_aside(path: Path, why: str) -> None:
    number = 1
    while (aside := path.with_name(f"{path.name}.broken-{number}")).exists():
        number += 1
    os.replace(path, aside)
    warnings.warn(f"tuning table {path} {why}; set aside as {aside.name}", stacklevel=3)


def _slug(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


# What a person is told


def describe(key: Key) -> str:
    """Name a problem for a person."""
    sizes = "x".join(str(size) for size in (key.out_features, key.in_features) if size)
    sizes += "" if "x" in sizes else " columns"
    tokens = f" T≤{key.tokens}" if key.tokens else ""
    rank = f" ρ={key.rank}" if key.rank else ""
    turned = " transposed" if key.transposed else ""
    blocks = f" K={key.blocks}" if key.blocks else ""
    return f"{key.kernel} {sizes}{tokens}{rank}{blocks} {key.dtype}{turned}"


def states(devices: Iterable[torch.device]) -> dict[str, str]:
    """Describe every table on disk, the user's before the shipped ones, for the `devices` that are here."""
    here = {_slug(identity(device, "forward").gpu): device for device in devices}
    found: dict[str, str] = {}
    for owner, folder in (("yours", user_table("").parent), ("shipped", SHIPPED)):
        for path in sorted(folder.glob("*.json")):
            found[str(path)] = f"{owner}; {_state(path, here.get(path.stem))}"
        for path in sorted(folder.glob("*.broken-*")):
            found[str(path)] = f"{owner}; set aside, not used"
    without = here.keys() - {Path(name).stem for name in found}
    nothing = "no table: the heuristic chooses; smoa-kernels tune measures"
    return found | {str(here[name]): nothing for name in sorted(without)}


def _state(path: Path, device: torch.device | None) -> str:
    table = _load(path)
    if table.broken:
        return f"{table.broken}; not used"
    entries = table.entries.values()
    if device is None:
        said = f"{len(entries)} entries, for a GPU that is not here"
    else:
        reasons = [(e.key, staleness(e.identity, identity(device, e.key.kernel))) for e in entries]
        stale = [f"{describe(key)}: {', '.join(changed)}" for key, changed in reasons if changed]
        unfinished = sum(not entry.complete for entry in entries)
        said = f"{len(entries) - len(stale)} of {len(entries)} entries in force"
        said += f", {unfinished} not finished" if unfinished else ""
        said += f", {len(stale)} stale: {_first(stale)}" if stale else ""
    return f"{said}, {_skipped(table)}" if table.skipped else said


def _skipped(table: Table) -> str:
    return f"{len(table.skipped)} skipped: {_first([reason for reason, _ in table.skipped])}"


def _first(reasons: Sequence[str]) -> str:
    """Five of them, and how many more there are."""
    more = f"; and {len(reasons) - 5} more" if len(reasons) > 5 else ""
    return "; ".join(reasons[:5]) + more
