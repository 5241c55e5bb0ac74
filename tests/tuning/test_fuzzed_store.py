"""Tuning tables that nobody would write: an error that names the file, or a table that is right; nothing else happens.

    make nightly     # 10,000 tables instead of 300

Reading one ends, and takes no more memory than twice the file beside what one value becomes (4 MiB at most).
"""

import copy
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bounds import ends, within
from draws import share
from tuning_cases import FORWARD, GRAD, entry, permute_entry

from smoa_kernels.kernels import store
from smoa_kernels.kernels.entries import Entry
from smoa_kernels.kernels.launch import BLOCK_GRAD_IEEE_CONFIGS
from smoa_kernels.kernels.store import SCHEMA, read

pytest.importorskip("hypothesis", reason="hypothesis draws these tables")
from hypothesis import example, given
from hypothesis import strategies as st

GOOD: dict[str, Any] = {
    "schema": SCHEMA,
    "entries": [
        e.to_json()
        for e in (
            permute_entry(),
            entry(GRAD, seconds={BLOCK_GRAD_IEEE_CONFIGS[0]: 0.25}, complete=False),
            entry(FORWARD, seconds={"split": 2.0, "merged": 1.0}),
        )
    ],
}
TEXT = json.dumps(GOOD, indent=1).encode()

# Values that a field does not expect: other types, numbers without end, names that are paths, code, deep nesting.
STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**80), 2**80),
    st.sampled_from([10**400, -1, 0, 2**31, 1e308, -0.0, float("inf"), float("-inf"), float("nan")]),
    st.sampled_from(
        [
            "../../etc/passwd",
            "/dev/zero",
            "C:\\con",
            "a\0b",
            "__import__('os')._exit(3)",
            "\ud800",
            "x" * 9999,
        ]
    ),
    st.text(max_size=9),
    st.recursive(st.just([]), lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=9),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a value can be put, each as the keys that lead there."""
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


PLACES = [place for place in places(GOOD) if place]


@st.composite
def changed_values(draw: st.DrawFn) -> bytes:
    data = copy.deepcopy(GOOD)
    for place in draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=3)):
        parent: Any = data
        try:
            for key in place[:-1]:
                parent = parent[key]
            if draw(st.booleans()) and isinstance(parent, dict):
                del parent[place[-1]]
            else:
                parent[place[-1]] = draw(STRANGE)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change has taken the place away
    return json.dumps(data).encode()


@st.composite
def changed_bytes(draw: st.DrawFn) -> bytes:
    data = bytearray(TEXT)
    for _ in range(draw(st.integers(0, 4))):
        data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(data[: draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))])


# Text of about so many bytes, of which Python makes something large, or for long.
HUGE: dict[str, Callable[[int], bytes]] = {
    "a number": lambda size: b"9" * size,
    "a fraction": lambda size: b"0." + b"1" * size,
    "depth": lambda size: b"[" * size,
    "depth that ends": lambda size: b"[" * (size // 2) + b"]" * (size // 2),
    "text": lambda size: b'"' + b"x" * size + b'"',
    "wide text": lambda size: b'"' + "\N{GRINNING FACE}".encode() * (size // 4) + b'"',
    "escapes": lambda size: b'"' + b"\\ud83d\\ude00" * (size // 12) + b'"',
    "no end of text": lambda size: b'"' + b"x" * size,
    "lists": lambda size: b"[" + b"[]," * (size // 3) + b"0]",
    "objects": lambda size: b"[" + b'{"":{}},' * (size // 8) + b"0]",
    "names": lambda size: b"{" + b",".join(b'"%d":0' % i for i in range(size // 9)) + b"}",
    "space": lambda size: b" " * size + b"0",
}
FIRST, LAST = json.dumps(GOOD).encode().split(b'"cpu"', 1)
AROUND = [
    (b"", b""),
    (b'{"schema": ', b', "entries": []}'),
    (b'{"schema": 1, "more": ', b', "entries": []}'),
    (b'{"schema": 1, "entries": ', b"}"),
    (b'{"schema": 1, "entries": [', b"]}"),
    (b'{"schema": 1, "entries": [{"key": ', b"}]}"),
    (b'{"schema": 1, "entries": []', b"}"),
    (FIRST, LAST),
]


def most(text: bytes) -> int:
    """Bytes that reading it may take: twice the file, what one value becomes, and the interpreter's own."""
    return 2 * len(text) + min(32 * len(text), 4 * 2**20) + 2**20


def check(text: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "gpu.json"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")

            def read_anew() -> dict[Any, Entry]:
                caught.clear()
                for left in folder.iterdir():
                    left.unlink()
                path.write_bytes(text)
                return read(path)

            found = within(most(text), read_anew)
        if caught:
            assert found == {}
            (warning,) = caught
            assert issubclass(warning.category, UserWarning)
            assert str(path) in str(warning.message)
            assert len(str(warning.message)) < 1000 + 2 * len(str(path))
            assert (folder / "gpu.json.broken-1").read_bytes() == text
            left = {"gpu.json.broken-1", "gpu.json.lock"}
        else:
            assert path.read_bytes() == text
            left = {"gpu.json"}
            for index, kept in found.items():  # what was taken comes back as it is
                assert Entry.from_json(json.loads(json.dumps(kept.to_json()))) == kept
                assert (kept.key, kept.identity) == index
        assert {file.name for file in folder.iterdir()} <= left | {"gpu.json.lock"}


@share(0.8)
@given(text=st.one_of(changed_values(), changed_bytes(), st.binary(max_size=64)))
def test_a_table_is_right_or_named(text: bytes) -> None:
    check(text)


@share(0.2)
@given(
    around=st.sampled_from(AROUND),
    kind=st.sampled_from(sorted(HUGE)),
    size=st.sampled_from([2**10, 2**16, 2**17 - 300, 2**18, 5 * 2**20]),
)
@example(around=AROUND[0], kind="depth", size=200_000)
@example(around=AROUND[3], kind="depth", size=200_000)
@example(around=AROUND[1], kind="a number", size=5000)
@example(around=AROUND[3], kind="objects", size=5 * 2**20)
def test_a_large_table_is_right_or_named(around: tuple[bytes, bytes], kind: str, size: int) -> None:
    before, after = around
    check(before + HUGE[kind](size) + after)


def test_a_right_table_of_many_entries(tmp_path: Path) -> None:
    """What is kept of it, and it alone, is less than twice as large."""
    some = [Entry.from_json(data) for data in GOOD["entries"]]
    entries = [replace(e, key=e.key._replace(tokens=tokens)) for tokens in range(2000) for e in some]
    path = tmp_path / "gpu.json"
    text = json.dumps({"schema": SCHEMA, "entries": [e.to_json() for e in entries]}, indent=1)
    assert path.write_text(text) > 4 * 2**20
    found = within(2 * len(text), lambda: read(path))
    assert list(found.values()) == entries


def test_a_table_larger_than_any_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    with path.open("wb") as stream:
        stream.truncate(2 * store.MOST_BYTES)  # a hole: it takes no room
    with pytest.warns(UserWarning, match="more than any table"):
        assert within(2**20, lambda: read(path)) == {}


def test_a_pipe_in_the_tables_place_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    os.mkfifo(path)
    with pytest.warns(UserWarning, match="cannot be read and is not used: it is no file"), ends():
        assert read(path) == {}
    assert path.is_fifo()
