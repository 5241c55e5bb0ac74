"""Tables on disk: what is read back, what is set aside, and that writers lose nothing, whatever interrupts them."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from dataclasses import replace
from pathlib import Path

import pytest
from tuning_cases import FORWARD, GRAD, PERMUTE, entry, kept, needs_interpreter, permute_entry

from smoa_kernels.kernels import store
from smoa_kernels.kernels.entries import Entry, Trial, merged
from smoa_kernels.kernels.json_reader import MOST_CHARACTERS
from smoa_kernels.kernels.launch import BLOCK_GRAD_IEEE_CONFIGS, PERMUTE_CONFIGS
from smoa_kernels.kernels.store import (
    SCHEMA,
    read,
    update,
    user_table,
)

HERE = Path(__file__).resolve().parent


@pytest.fixture
def table() -> Path:
    return user_table("NVIDIA H100 80GB HBM3")


def test_a_table_comes_back_as_it_was_written(table: Path) -> None:
    entries = [
        permute_entry(),
        entry(GRAD, seconds={BLOCK_GRAD_IEEE_CONFIGS[0]: 0.25}, complete=False).with_trial(
            Trial(BLOCK_GRAD_IEEE_CONFIGS[1], reason="wrong numbers")
        ),
        entry(FORWARD, seconds={"split": 2.0, "merged": 1.0}),
    ]
    update(table, entries)
    assert table.name == "nvidia-h100-80gb-hbm3.json"
    assert kept(table) == {e.key: e for e in entries}
    assert json.loads(table.read_text())["schema"] == SCHEMA


def test_no_table_holds_nothing(table: Path) -> None:
    assert read(table) == {}
    assert not table.parent.exists()  # a question writes nothing


def good(table: Path) -> dict[str, object]:
    update(table, [permute_entry()])
    found: dict[str, object] = json.loads(table.read_text())
    return found


def broken_by(change: str, data: dict[str, object]) -> str:
    entries = data["entries"]
    assert isinstance(entries, list)
    if change == "truncated":
        return json.dumps(data)[:-40]
    if change == "future schema":
        return json.dumps(data | {"schema": SCHEMA + 1})
    if change == "foreign":
        return json.dumps([1, 2])
    if change == "foreign schema":
        return json.dumps({"schema": "https://json-schema.org"})
    if change == "no entries":
        return json.dumps({"schema": SCHEMA})
    if change == "entries twice":
        return json.dumps(data)[:-1] + ', "entries": []}'
    if change == "another member":
        return json.dumps(data | {"more": 1})
    if change == "unknown kernel":
        entries[0]["key"]["kernel"] = "matmul"
    if change == "a launch that is none":
        entries[0]["trials"][1]["choice"]["num_warps"] = 3
    if change == "more warps than there are":
        entries[0]["trials"][1]["choice"]["num_warps"] = 64
    if change == "a time that no float holds":
        return json.dumps(data).replace('"seconds": 3.0', f'"seconds": {10**400}')
    if change == "nested without end":
        return f'{{"schema": {SCHEMA}, "entries": {"[" * 100_000}'
    if change == "a tile that does not fit":
        entries[0] = json.loads(
            json.dumps(entry(GRAD, seconds={BLOCK_GRAD_IEEE_CONFIGS[0]: 1.0}).to_json()).replace(
                '"padded_out": 64', '"padded_out": 16'
            )
        )
    if change == "a negative time":
        entries[0]["trials"][0]["seconds"] = -1
    if change == "a missing field":
        del entries[0]["identity"]["torch"]
    if change == "text for a number":
        entries[0]["key"]["tokens"] = "8"
    return json.dumps(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("truncated", "is not JSON"),
        ("future schema", f"has schema {SCHEMA + 1}, this version knows up to {SCHEMA}"),
        ("foreign", "is not JSON as tables are .Expecting '{' at character 0"),
        ("foreign schema", "is not a table of smoa-kernels"),
        ("no entries", "holds no list of entries"),
        ("entries twice", "is not a table of smoa-kernels"),
        ("another member", "is not a table of smoa-kernels"),
        ("unknown kernel", "kernel must be one of .* got 'matmul'"),
        ("a launch that is none", "num_warps = 3"),
        ("more warps than there are", "num_warps = 64"),
        ("a time that no float holds", "seconds must be positive and finite, got 1000"),
        ("nested without end", "is not JSON"),
        ("a tile that does not fit", "does not divide the layout"),
        ("a negative time", "seconds must be positive"),
        ("a missing field", "holds an entry that is none"),
        ("text for a number", "tokens must be an int, got '8'"),
    ],
)
def test_a_broken_file_is_named_set_aside_and_never_fatal(change: str, words: str, table: Path) -> None:
    text = broken_by(change, good(table))
    table.write_text(text)
    with pytest.warns(UserWarning, match=words) as caught:
        assert read(table) == {}
    assert len(caught) == 1
    assert str(table) in str(caught[0].message)
    aside = table.with_name(f"{table.name}.broken-1")
    assert aside.read_text() == text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(table) == {}  # named once
        update(table, [permute_entry()])
        assert set(kept(table)) == {PERMUTE}
    table.write_text("{")
    with pytest.warns(UserWarning, match="broken-2"):
        read(table)
    assert aside.read_text() == text


def test_bytes_that_are_no_text(table: Path) -> None:
    table.parent.mkdir(parents=True)
    table.write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="is not text"):
        assert read(table) == {}


def test_a_writer_sets_a_broken_table_aside_too(table: Path) -> None:
    table.parent.mkdir(parents=True)
    table.write_text("{")
    with pytest.warns(UserWarning, match="set aside as .*broken-1"):
        update(table, [permute_entry()])
    assert set(kept(table)) == {PERMUTE}


def test_nothing_is_written_that_would_not_be_read(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading it would set the whole table aside."""
    update(table, [permute_entry()])
    before = table.read_text()
    other = permute_entry(PERMUTE._replace(tokens=16))
    wordy = other.with_trial(Trial(PERMUTE_CONFIGS[0], reason="x" * MOST_CHARACTERS))
    with pytest.raises(ValueError, match=f"entries must each have at most {MOST_CHARACTERS} characters"):
        update(table, [wordy])
    monkeypatch.setattr(store, "MOST_BYTES", len(before) + 100)
    with pytest.raises(OSError, match="more than any table that is read") as caught:
        update(table, [other])
    assert caught.value.filename == str(table)
    assert table.read_text() == before
    assert kept(table) == {PERMUTE: permute_entry()}


def test_the_longest_entry_that_is_written_is_read(table: Path) -> None:
    """Wherever in the table it stands: what is held of the file at a time begins anywhere."""
    short = [permute_entry(PERMUTE._replace(tokens=1 << step)) for step in range(9)]
    empty = permute_entry().with_trial(Trial(PERMUTE_CONFIGS[0], reason=""))
    length = MOST_CHARACTERS - len(json.dumps([[empty.to_json()]], indent=1))
    for before in range(len(short)):
        key = PERMUTE._replace(tokens=9)
        wordy = replace(empty, key=key).with_trial(Trial(PERMUTE_CONFIGS[0], reason="x" * length))
        entries = [*short[:before], wordy, *short[before:]]
        table.unlink(missing_ok=True)
        update(table, entries)
        assert list(read(table).values()) == entries
    with pytest.raises(ValueError, match="entries must each have at most"):
        update(table, [wordy.with_trial(Trial(PERMUTE_CONFIGS[0], reason="x" * (length + 1)))])


def test_what_is_not_ours_is_not_moved(table: Path) -> None:
    table.parent.mkdir(parents=True)
    table.write_text("{")
    with pytest.warns(UserWarning, match="it is not used"):
        assert read(table, set_aside=False) == {}
    assert table.read_text() == "{"


def test_a_folder_that_cannot_be_written_to(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, whom no permission stops: the lock stands for every way it fails."""

    def refuse(path: Path) -> object:
        raise PermissionError("read-only file system")

    table.parent.mkdir(parents=True)
    table.write_text("{")
    monkeypatch.setattr(store, "_lock", refuse)
    with pytest.warns(UserWarning, match="it is not used"):
        assert read(table) == {}
    with pytest.raises(PermissionError):
        update(table, [permute_entry()])


def test_a_folder_in_the_tables_place(table: Path) -> None:
    table.mkdir(parents=True)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert read(table) == {}


def test_what_two_writers_found_for_one_key_is_joined(table: Path) -> None:
    first, second, third = PERMUTE_CONFIGS
    update(table, [entry(seconds={first: 3.0}, complete=False).with_trial(Trial(second, reason="died"))])
    update(table, [entry(seconds={first: 3.5, third: 2.0}, complete=False).with_trial(Trial(second, 1.0))])
    found = kept(table)[PERMUTE]
    assert {t.choice: t.seconds for t in found.trials} == {first: 3.5, second: 1.0, third: 2.0}
    update(table, [entry(seconds={first: 4.0}, complete=True).with_trial(Trial(second, reason="died"))])
    found = kept(table)[PERMUTE]
    assert {t.choice: t.seconds for t in found.trials} == {first: 4.0, second: 1.0, third: 2.0}
    assert found.complete


@pytest.mark.parametrize("changed", [{"torch": "1.0"}, {"triton": "2.0"}, {"multiprocessors": 7}], ids=str)
def test_what_another_environment_or_slice_found_stands_beside(
    changed: dict[str, object], table: Path
) -> None:
    first, second, _ = PERMUTE_CONFIGS
    here, there = entry(seconds={first: 1.0}, complete=False), permute_entry(**changed)
    for added in (here, there, entry(seconds={second: 2.0})):
        update(table, [added])
    ours = merged(here, entry(seconds={second: 2.0}))
    assert list(read(table).values()) == [ours, there]


TUNING = """
import sys
sys.path.insert(0, {here!r})
from tuning_cases import CPU, PERMUTE, permute_job, scripted
from smoa_kernels.kernels import lookup
from smoa_kernels.tuning.tuner import tune
keys = [PERMUTE._replace(tokens=1 << step, blocks={blocks}) for step in range({steps})]
timer = scripted(lambda choice: float(choice.block_t))
tune([permute_job(key) for key in keys], device=CPU, timer=timer, known={{}}, save=lookup.keep)
"""


def tuning(blocks: int, steps: int, before: str = "") -> subprocess.Popen[str]:
    """A process that tunes problems of its own into the table of this machine."""
    program = before + TUNING.format(here=str(HERE), blocks=blocks, steps=steps)
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=HERE.parents[1],
    )


@needs_interpreter
@pytest.mark.parametrize("of", [(1, 2), (1, 1)], ids=["different problems", "the same problems"])
def test_two_processes_tune_into_one_table(of: tuple[int, int]) -> None:
    processes = [tuning(blocks, 5) for blocks in of]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    found = kept()
    assert {(key.blocks, key.tokens) for key in found} == {(n, 1 << s) for n in of for s in range(5)}
    for tuned in found.values():
        assert tuned.complete
        assert {t.choice: t.seconds for t in tuned.trials} == {c: float(c.block_t) for c in PERMUTE_CONFIGS}


@needs_interpreter
def test_a_writer_waits_for_one_that_has_read_and_not_yet_written() -> None:
    """The moment at which, without the lock, the second one's entry would be lost."""
    paused = (
        "import os\nreplace = os.replace\n"
        "os.replace = lambda a, b: (print('writing', flush=True), input(), replace(a, b))\n"
    )
    other = permute_entry(PERMUTE._replace(tokens=16))
    with tuning(7, 1, paused) as process, ThreadPoolExecutor(1) as pool:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "writing\n"
        written = pool.submit(update, user_table("cpu"), [other])
        with pytest.raises(TimeoutError):
            written.result(timeout=0.5)
        process.stdin.write("\n" * 20)
        process.stdin.close()
        written.result(timeout=60)
        assert process.wait(timeout=60) == 0
    assert {(key.blocks, key.tokens) for key in kept()} == {(7, 1), (2, 16)}


@needs_interpreter
def test_kill_in_the_middle_of_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at the worst moment: the new file is written, not yet renamed, and the lock is held."""
    table = user_table("cpu")
    update(table, [permute_entry()])
    before = table.read_text()
    stopped = "import os, time\nos.replace = lambda a, b: (print('writing', flush=True), time.sleep(60))\n"
    with tuning(7, 1, stopped) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
    assert table.read_text() == before
    start = time.monotonic()
    update(table, [permute_entry(PERMUTE._replace(tokens=16))])
    assert time.monotonic() - start < 5  # the lock went with its holder
    assert {key.tokens for key in kept(table)} == {8, 16}


def test_an_entry_that_holds_nothing_timed_has_no_best() -> None:
    empty = Entry(PERMUTE, permute_entry().identity, PERMUTE_CONFIGS[0])
    assert empty.best() is None
    assert empty.with_trial(Trial(PERMUTE_CONFIGS[0], reason="died")).best() is None
