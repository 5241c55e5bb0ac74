"""Tables of measured choices, one JSON file per GPU: the user's in the cache folder, the shipped ones in the package.

A table is never in the way: one that cannot be read is named in a warning and set aside, and what it would have
chosen is the heuristic's. What was measured with other software, or on another slice of the GPU, stands beside: two
environments with one cache folder do not undo each other's work. Writers hold a lock, read again, add what they found
and replace the file in one step, so that two of them lose nothing and a reader never sees half a file.

A file is read an entry at a time (`json_reader`): one that is no table is known by the first value that no table has,
whose objects take 4 MiB at most, and one of more than `MOST_BYTES` is not opened. What is kept of a table as `update`
writes it takes less than twice the file.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from filelock import FileLock

from ..checks import check_kind
from ..files import cache_folder, replace_file
from .entries import Entry, merged
from .heuristic import Key
from .identity import Identity, slug
from .json_reader import MOST_CHARACTERS, JsonReader

__all__ = ["SCHEMA", "SHIPPED", "Table", "read", "shipped_table", "update", "user_folder", "user_table"]

Table: TypeAlias = Mapping[tuple[Key, Identity], Entry]
"""Entries by problem and by what they were measured on."""

SCHEMA = 1
SHIPPED = Path(__file__).resolve().parent / "tables"
LOCK_SECONDS = 60.0
MOST_BYTES = 64 * 2**20  # tens of thousands of entries


def user_folder() -> Path:
    """Where the user's tables are: `tuning` in the cache folder.

    Example:
        >>> user_folder().name
        'tuning'
    """
    return cache_folder() / "tuning"


def user_table(gpu: str) -> Path:
    """The user's table of a GPU, by the driver's name for it.

    Args:
        gpu: as the driver names it.

    Example:
        >>> user_table("NVIDIA H100 80GB HBM3").name
        'nvidia-h100-80gb-hbm3.json'
    """
    return user_folder() / f"{slug(gpu)}.json"


def shipped_table(gpu: str) -> Path:
    """The table of a GPU that comes with the package, if there is one.

    Args:
        gpu: as the driver names it.

    Example:
        >>> shipped_table("a GPU that nobody knows").exists()
        False
    """
    return SHIPPED / f"{slug(gpu)}.json"


def read(path: Path, *, set_aside: bool = True) -> Table:
    """The entries of a table; none where there is no file, or one that cannot be used.

    A file that is truncated, foreign, broken by hand, of a future schema or of more than `MOST_BYTES` (64 MiB) is named
    in one warning and, where `set_aside` and the folder can be written to, renamed to `NAME.broken-1` (or -2, …).
    Whatever is in it, reading takes no more memory than twice the file and 4 MiB (of a right table that somebody wrote
    without its line breaks, 2.2 times the file).

    Args:
        path: of the table.
        set_aside: rename one that cannot be used.

    Raises:
        TypeError: no path, or `set_aside` no bool.

    Example:
        >>> read(user_table("a GPU that was never tuned"))
        {}
    """
    check_kind("path", path, Path)
    check_kind("set_aside", set_aside, bool)
    try:
        return _parse(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        _warn(f"tuning table {path} cannot be read and is not used: {error}")
        return {}
    except _BrokenError as error:
        words = str(error)  # alone: with the error goes what was read of the file
    with suppress(OSError):
        if set_aside:
            with _lock(path):
                return _parse_or_set_aside(path)
    _warn(f"tuning table {path} {words}; it is not used")
    return {}


def update(path: Path, entries: Iterable[Entry]) -> Table:
    """Add entries to a table, made where there is none; returns what it then holds.

    Args:
        path: of the table.
        entries: what was measured; where the table has one of the same key and identity, the two are merged.

    Raises:
        TypeError: no path, or something else than entries.
        ValueError: an entry is longer than any that is read back; nothing was written.
        OSError: the folder cannot be written to, the table would be larger than any that is read back, or another
            process holds the lock for a minute.

    Example:
        >>> update(user_table("a GPU"), [])
        {}
    """
    check_kind("path", path, Path)
    try:
        entries = list(entries)
    except TypeError as error:
        raise TypeError(f"entries must be entries of a table, got {entries!r}") from error
    for entry in entries:
        check_kind("entries", entry, Entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path):
        table = dict(_parse_or_set_aside(path))
        for entry in entries:
            older = table.get(_index(entry))
            table[_index(entry)] = entry if older is None else merged(older, entry)
            _check_length(table[_index(entry)])
        data = {"schema": SCHEMA, "entries": [entry.to_json() for entry in table.values()]}
        text = f"{json.dumps(data, indent=1)}\n".encode()
        if len(text) > MOST_BYTES:
            words = f"it would hold {len(text)} bytes, more than any table that is read ({MOST_BYTES})"
            raise OSError(errno.EFBIG, words, str(path))
        replace_file(path, text)
    return table


class _BrokenError(Exception):
    """Why a file is no table, cut: a value that is told of may be as long as an entry."""

    def __init__(self, words: str) -> None:
        super().__init__(words[:500])


_FOREIGN = "is not a table of smoa-kernels"


def _index(entry: Entry) -> tuple[Key, Identity]:
    return entry.key, entry.identity


def _parse(path: Path) -> Table:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is no file")  # a pipe would be waited for
    if found.st_size > MOST_BYTES:
        raise _BrokenError(f"holds {found.st_size} bytes, more than any table ({MOST_BYTES})")
    with path.open(encoding="utf-8") as stream:
        try:
            return _table(JsonReader(stream))
        except UnicodeDecodeError as error:
            raise _BrokenError("is not text") from error
        except (ValueError, RecursionError) as error:
            raise _BrokenError(f"is not JSON as tables are ({error})") from error


def _table(reader: JsonReader) -> Table:
    schema: int | None = None
    table: dict[tuple[Key, Identity], Entry] | None = None
    for name in reader.members():
        if name == "schema" and schema is None:
            schema = _schema(reader.value())
        elif name == "entries" and table is None:
            table = {_index(entry): entry for entry in map(_entry, reader.items())}
        else:  # not skipped: there may be millions
            raise _BrokenError(_FOREIGN)
    reader.end()
    if schema is None:
        raise _BrokenError(_FOREIGN)
    if table is None:
        raise _BrokenError("holds no list of entries")
    return table


def _schema(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise _BrokenError(_FOREIGN)
    if value > SCHEMA:
        raise _BrokenError(f"has schema {value}, this version knows up to {SCHEMA}")
    return value


def _check_length(entry: Entry) -> None:
    # As deep in lists as in a table, by which its lines are indented.
    length = len(json.dumps([[entry.to_json()]], indent=1))
    if length > MOST_CHARACTERS:
        raise ValueError(
            f"entries must each have at most {MOST_CHARACTERS} characters as JSON, got {length} for {entry.key}"
        )


def _entry(data: Any) -> Entry:
    try:
        return Entry.from_json(data)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _BrokenError(f"holds an entry that is none ({type(error).__name__}: {error})") from error


def _parse_or_set_aside(path: Path) -> Table:
    """Under the lock: another process may have set the file aside, or written a good one, in the meantime."""
    try:
        return _parse(path)
    except FileNotFoundError:
        return {}
    except _BrokenError as error:
        number = 1
        while (aside := path.with_name(f"{path.name}.broken-{number}")).exists():
            number += 1
        os.replace(path, aside)
        _warn(f"tuning table {path} {error}; set aside as {aside.name}")
        return {}


def _lock(path: Path) -> FileLock:
    """flock on POSIX, released by the system when its holder dies; a lock file where there is none."""
    return FileLock(path.with_name(f"{path.name}.lock"), timeout=LOCK_SECONDS)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)
