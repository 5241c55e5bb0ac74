"""The table of measured choices: the entries in force, skipped entries, broken files, and concurrent writers."""

import json
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from places import kill_at, python
from problems import make_problem

from smoa_kernels.backends import triton as triton_backend
from smoa_kernels.cli import info
from smoa_kernels.definition.partition import BlockPartition
from smoa_kernels.definition.precision import KERNEL_PRECISIONS, PRECISIONS
from smoa_kernels.kernels import architectures, table
from smoa_kernels.kernels.architectures import identity
from smoa_kernels.kernels.launch import Launch
from smoa_kernels.kernels.permute import PERMUTE, gather_columns
from smoa_kernels.kernels.spec import Config, Key, bucket
from smoa_kernels.kernels.table import SCHEMA, Choice, Entry, fastest, keep, read, select, user_table
from smoa_kernels.tuning.tuner import multiplied_in

CPU, TODAY = torch.device("cpu"), time.strftime("%Y-%m-%d")
KEY = Key("permute", "fp32", blocks=2, in_features=12, tokens=8, padded_in=64)
FORWARD = Key("forward", "bf16", 3, 2, 12, 10, 8)
FIRST, SECOND, THIRD, *_, LAST = PERMUTE.candidates(KEY, "cpu")


def entry(choice: Choice | None = SECOND, key: Key = KEY, **changed: object) -> Entry:
    """An entry of this machine, with the `changed` fields of its identity."""
    return Entry(key, replace(identity(CPU), **changed), choice, 1e-6 if choice else None)  # type: ignore[arg-type]


def put(*entries: Entry) -> None:
    keep(identity(CPU), *entries)


def kept() -> dict[Key, Entry]:
    return read(user_table("cpu"), identity(CPU)).entries


def ask() -> Config:
    return select(PERMUTE, KEY, CPU)


@pytest.fixture
def path() -> Path:
    """The path of this machine's table; its folder exists."""
    found = user_table("cpu")
    found.parent.mkdir(parents=True)
    return found


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """The line of `smoa-kernels info` about a file."""
    monkeypatch.setattr(info, "_gpus", lambda: [CPU])
    return lambda path: info._tables()[str(path)]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(0, 1), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (2**13, 2**13), (2**13 + 1, 2**14)],
)
def test_bucket_edges(tokens: int, expected: int) -> None:
    assert bucket(tokens) == expected


# The choice in force


def test_the_users_table_comes_before_the_shipped_one_and_that_before_the_heuristic(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask() == FIRST
    assert fastest(FORWARD, CPU) is None
    assert not cache.exists()
    put(entry(THIRD), entry("split", FORWARD))
    monkeypatch.setattr(table, "SHIPPED", tmp_path)
    user_table("cpu").rename(tmp_path / "cpu.json")
    table.clear_cache()
    assert ask() == THIRD
    put(entry(LAST), entry(None, FORWARD))
    assert ask() == LAST
    assert fastest(FORWARD, CPU) == "split"  # the first table's key is not complete


def test_another_problem_does_not_borrow_an_entry() -> None:
    put(entry(key=KEY._replace(tokens=16)), entry(key=KEY._replace(blocks=3)))
    assert ask() == FIRST
    put(entry())
    assert ask() == SECOND  # a new entry is in force at once


@pytest.mark.parametrize(
    "changed",
    [
        {"gpu": "another"},
        {"capability": "sm_90"},
        {"multiprocessors": 66},
        {"triton": "2.0"},
        {"source": "edited"},
    ],
    ids=str,
)
def test_a_stale_entry_is_ignored_with_a_sentence_and_stays(
    changed: dict[str, Any], path: Path, said: Callable[[Path], str]
) -> None:
    stale = entry(**changed)
    path.write_text(json.dumps({"schema": SCHEMA, "entries": [stale.to_json()]}))
    with pytest.warns(
        UserWarning, match="measured with another GPU, Triton or version of the kernels"
    ) as caught:
        assert (ask(), ask()) == (FIRST, FIRST)
    assert len(caught) == 1
    assert said(path).startswith(f"yours, {TODAY}; 0 entries in force, 1 measured with other versions")
    put(entry(THIRD))  # two environments may share a table
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask() == THIRD
    assert stale.to_json() in json.loads(path.read_text())["entries"]


def test_a_configuration_outside_the_search_space_is_not_launched() -> None:
    put(entry(replace(FIRST, num_warps=64)))
    with pytest.warns(UserWarning, match="permute has no configuration t=64 p=128 warps=64"):
        assert ask() == FIRST


@pytest.mark.parametrize("file", ["grouped_linear.py", "permute.py", "common.py", "../backends/triton.py"])
def test_an_edit_of_any_source_makes_entries_stale(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Path(architectures.__file__).resolve().parents[1]
    for one in (*(package / "kernels").glob("*.py"), package / "backends" / "triton.py"):
        copy = tmp_path / one.relative_to(package)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(one.read_bytes())
    monkeypatch.setattr(architectures, "__file__", str(tmp_path / "kernels" / "architectures.py"))
    before = architectures.source_hash.__wrapped__()
    with (tmp_path / "kernels" / file).open("a") as stream:
        stream.write("# edited\n")
    assert architectures.source_hash.__wrapped__() != before


def test_a_launch_uses_a_tuned_choice_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.arange(12) % 2
    p = BlockPartition.from_labels(labels, labels, 2)
    launched: list[object] = []
    monkeypatch.setattr(Launch, "__call__", lambda launch, *arguments: launched.append(launch.config))
    for _ in range(2):
        gather_columns(torch.zeros(5, 12), p, 64)
        put(entry())
    assert launched == [FIRST, SECOND]


def test_choices_are_cached_until_the_table_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not asked for longest goes first: token counts that come again stay."""
    monkeypatch.setattr(table, "MOST_CACHED", 2)
    asked: list[int] = []
    find = table.cached(asked.append)
    for number in range(2, 9):
        find(1)
        find(number)
    assert asked == [1, *range(2, 9)]
    put(entry())
    find(1)
    assert asked.count(1) == 2


@pytest.mark.parametrize("precision", KERNEL_PRECISIONS)
def test_a_table_chooses_any_algorithm(precision: str) -> None:
    """Without a table "fused" is the rule for few tokens."""
    problem = make_problem(ranks=(3, 2), tokens=8).to(PRECISIONS[precision].dtype)
    adapter, sizes = problem.adapter(), (3, 2, *problem.weight.shape, 8)
    factors = "fp32" if precision == "tf32" else precision
    with multiplied_in(precision):
        for stage, x in (("forward", problem.x), ("input_gradient", problem.dy)):
            assert triton_backend._chosen(stage, x, adapter) == "fused"
            put(entry("merged", Key(stage, precision, *sizes, factors=factors)))
            assert triton_backend._chosen(stage, x, adapter) == "merged"


# Reading tables


ENTRIES = [
    entry(),
    replace(entry(LAST, KEY._replace(tokens=4)), refused={"t=64": "wrong"}),
    entry("merged", FORWARD),
]


def test_a_table_comes_back_as_it_was_written() -> None:
    put(*ENTRIES)
    assert user_table("NVIDIA H100 80GB HBM3").name == "nvidia-h100-80gb-hbm3.json"
    assert kept() == {e.key: e for e in ENTRIES}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e["key"].update(kernel=3), "kernel must be a str, got int"),
        (lambda e: e.pop("identity"), "no field 'identity'"),
        (lambda e: e.update(note="mine"), "a field is unknown"),
        (lambda e: e["key"].update(dtype="int8"), "dtype must be one of bf16"),
        (lambda e: e["key"].update(rank=[1]), "rank must be an int, got list"),
        (lambda e: e["key"].update(colour=3), "unexpected keyword argument 'colour'"),
        (lambda e: e["choice"].update(num_warps="4"), "num_warps must be an int, got str"),
        (lambda e: e["choice"].update(colour=3), "unexpected keyword argument 'colour'"),
        (lambda e: e.update(choice="split"), "must be a mapping, not str"),
        (lambda e: e.update(seconds=-1.0), "seconds must be a positive, finite float, got -1.0"),
        (lambda e: e.update(seconds=10**400), "seconds must be a positive, finite float, got 1000"),
        (lambda e: e.update(refused={"t=64": 3}), "the reason of 't=64' must be a str, got int"),
        (lambda e: e.update(refused=[]), "has no attribute 'items'"),
    ],
)
def test_a_bad_entry_is_skipped_and_named_and_the_others_stay_in_force(
    change: Callable[[dict[str, Any]], object], words: str, path: Path, said: Callable[[Path], str]
) -> None:
    put(*ENTRIES)
    data = json.loads(path.read_text())
    bad = data["entries"][1]
    change(bad)
    path.write_text(json.dumps(data))
    table.clear_cache()
    with pytest.warns(UserWarning, match=f"{path} has 1 bad entries: entry 2: .*{words}") as caught:
        assert ask() == SECOND
    assert len(caught) == 1
    assert len(str(caught[0].message)) < 500 + len(str(path))
    assert fastest(FORWARD, CPU) == "merged"
    assert said(path).startswith(f"yours, {TODAY}; 2 entries in force")
    put(entry(THIRD))  # another version may understand the skipped entry
    assert bad in json.loads(path.read_text())["entries"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b'{"schema": 2, "entries": ' + b"[" * 100_000, "is not JSON"),
        (b"[1, 2]", "is not a table of smoa-kernels"),
        (b'{"schema": 2}', "is not a table of smoa-kernels"),
        (b'{"schema": 1, "entries": []}', "has schema 1, this version knows 2"),
    ],
    ids=str,
)
def test_a_file_that_is_no_table_is_named_and_set_aside_by_the_next_writer(
    text: bytes, words: str, path: Path, said: Callable[[Path], str]
) -> None:
    path.write_bytes(text)
    with pytest.warns(UserWarning, match=f"{path} .*{words}.*; it is not used") as caught:
        assert ask() == FIRST
    assert len(caught) == 1
    assert words in said(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # reading moves no file
    with pytest.warns(UserWarning, match=f"{words}.*; set aside as cpu.json.broken-1"):
        put(entry())
    assert ask() == SECOND
    aside = path.with_name("cpu.json.broken-1")
    assert aside.read_bytes() == text
    assert said(aside) == "yours; set aside, not used"
    path.write_text("{")
    with pytest.warns(UserWarning, match="broken-2"):
        put()


def test_a_folder_in_the_tables_place(path: Path) -> None:
    path.mkdir()
    with pytest.warns(UserWarning, match="cannot be read: .* Is a directory"):
        assert ask() == FIRST
    with pytest.raises(OSError, match="Is a directory"):
        put(entry())


def test_info_names_tables_of_other_gpus_and_gpus_without_one(
    path: Path, said: Callable[[Path], str]
) -> None:
    put(entry())
    other = path.rename(user_table("NVIDIA H100"))
    assert said(other) == f"yours, {TODAY}; for a GPU that is not here"
    assert info._tables()["cpu"] == "no table: the heuristic chooses; smoa-kernels tune measures"


def test_info_says_which_algorithm_runs_at_which_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "_gpus", lambda: [CPU])
    words = "fused up to 64 (bf16), 64 (fp16), 32 (tf32), 16 (fp32) tokens, then merged"
    assert info._kernels()["cpu, auto"].startswith(words)


# Concurrent writers


WRITING = """
{before}
from tuning.test_table import KEY, entry, put
for step in range({steps}):
    put(entry(key=KEY._replace(tokens=1 << step, blocks=1)), entry(key=KEY._replace(tokens=1 << step, blocks={own})))
"""


def writing(own: int, steps: int, before: str = "") -> subprocess.Popen[str]:
    """A process that writes common problems and some of its own into this machine's table."""
    return python(WRITING.format(before=before, steps=steps, own=own))


@pytest.mark.slow
def test_two_processes_write_into_one_table() -> None:
    """Both write the same problems and some of their own, and each first reads the other's entries."""
    processes = [writing(own, 20) for own in (2, 3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert {(key.blocks, key.tokens) for key in kept()} == {(n, 1 << s) for n in (1, 2, 3) for s in range(20)}


def test_kill_in_the_middle_of_a_write(path: Path) -> None:
    """Killed when the new file is written but not renamed, with the lock held."""
    put(entry())
    before = path.read_text()
    stopped = "import os, time\nos.replace = lambda a, b: (print('writing', flush=True), time.sleep(60))\n"
    kill_at(writing(7, 1, stopped), "writing")
    assert path.read_text() == before
    put(entry(key=KEY._replace(tokens=16)))  # the killed process's lock is free
    assert {key.tokens for key in kept()} == {8, 16}
