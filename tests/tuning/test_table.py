"""The table of measured choices: the entries in force, stale and damaged ones, and concurrent writers."""

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from places import kill_at, python
from problems import make_problem

from smoa_kernels.backends import triton as triton_backend
from smoa_kernels.cli import info
from smoa_kernels.definition.partition import BlockPartition
from smoa_kernels.definition.precision import KERNEL_PRECISIONS, PRECISIONS, multiplied_in
from smoa_kernels.kernels import architectures
from smoa_kernels.kernels.architectures import identity
from smoa_kernels.kernels.launch import Launch, operands_of
from smoa_kernels.kernels.permute import PERMUTE, gather_columns
from smoa_kernels.kernels.spec import Config, Key, bucket
from smoa_kernels.kernels.table import Choice, keep, read, select, user_table

CPU, TODAY = torch.device("cpu"), time.strftime("%Y-%m-%d")
KEY = Key("permute", "fp32", blocks=2, in_features=12, tokens=8, padded_in=64)
FORWARD = Key("forward", "bf16", 3, 2, 12, 10, 8)
FIRST, SECOND, THIRD, *_, LAST = PERMUTE.candidates(KEY, "cpu")


def put(choice: Choice | None = SECOND, key: Key = KEY) -> None:
    keep(CPU, "choices", {str(key): {"choice": None if choice is None else str(choice)}})


def kept() -> dict[str, Any]:
    return read(user_table("cpu")).part(identity(CPU), "choices")


def ask() -> Config:
    return select(PERMUTE, KEY, CPU)


@pytest.fixture
def path() -> Path:
    """The path of this machine's table; its folder exists."""
    path = user_table("cpu")
    path.parent.mkdir(parents=True)
    return path


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """The line of `smoa-kernels info` about a file."""
    monkeypatch.setattr(info, "_gpus", lambda: [CPU])
    return lambda path: info._tables()[str(path)]


# The choice in force


def test_an_entry_comes_before_the_heuristic_for_its_problem_alone(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for launches, which are kept until the table changes."""
    labels, launched = torch.arange(12) % 2, list[Config]()
    partition = BlockPartition.from_labels(labels, labels, 2)
    monkeypatch.setattr(Launch, "__call__", lambda launch, *arguments: launched.append(launch.config))

    def asked() -> Config:
        gather_columns(torch.zeros(5, 12), partition, 64)
        assert launched[-1] == ask()
        return launched[-1]

    assert asked() == FIRST
    assert not cache.exists()
    put(key=KEY._replace(tokens=16))
    put(None)  # the key is being tuned
    assert asked() == FIRST
    put(LAST)
    assert asked() == LAST


def test_each_problem_and_candidate_has_its_own_name() -> None:
    changed = [KEY._replace(**{name: type(value)(7)}) for name, value in KEY._asdict().items() if value != 7]
    assert len({str(key) for key in (KEY, *changed)}) == len(changed) + 1
    candidates = PERMUTE.candidates(KEY, "cpu")
    assert len(set(map(str, candidates))) == len(candidates)
    assert str(KEY) == "permute fp32 blocks=2 in_features=12 tokens=8 padded_in=64"
    assert str(FIRST) == "t=64 p=128 warps=2 stages=1"
    assert user_table("NVIDIA H100 80GB HBM3").name == "nvidia-h100-80gb-hbm3.json"
    edges = {0: 1, 1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 2**13: 2**13, 2**13 + 1: 2**14}
    assert {tokens: bucket(tokens) for tokens in edges} == edges


def test_a_stale_entry_is_ignored_with_a_sentence_and_stays(
    path: Path, said: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another GPU, architecture, slice of a GPU, Triton, assembler, source of the kernels."""
    answers: dict[str, object] = {"gpu_name": "another", "architecture": "sm_90", "multiprocessors": 66}
    answers |= {"assembler": "ptxas 13", "source_hash": "edited"}
    machines = {}
    for name, answer in (*answers.items(), ("triton", "2.0")):
        with monkeypatch.context() as elsewhere:
            if name == "triton":
                elsewhere.setattr("triton.__version__", answer)
            else:
                elsewhere.setattr(architectures, name, lambda *_, answer=answer: answer)
            machines[identity.__wrapped__(CPU)] = {"choices": {str(KEY): {"choice": str(THIRD)}}}
    path.write_text(json.dumps(machines))
    words = "measured with another GPU, Triton or version of the kernels"
    with pytest.warns(UserWarning, match=words) as caught:
        assert (ask(), ask()) == (FIRST, FIRST)
    assert len(caught) == 1
    assert said(path).startswith(f"{TODAY}; 0 keys in force, 6 measured with other versions; was {words}")
    put(LAST)  # two environments may share a table
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask() == LAST
    assert json.loads(path.read_text()).items() >= machines.items()


def test_an_edit_of_any_source_makes_entries_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    edited, read_bytes = "", Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read_bytes(path) + b"#" * (path.name == edited))
    hashes = set()
    for edited in ("", "grouped_linear.py", "permute.py", "common.py", "triton.py"):  # noqa: B007
        hashes.add(architectures.source_hash.__wrapped__())
    assert len(hashes) == 5


@pytest.mark.parametrize("precision", KERNEL_PRECISIONS)
def test_a_table_chooses_any_algorithm(precision: str) -> None:
    """Without a table "fused" is the rule for few tokens."""
    problem = make_problem(ranks=(3, 2), tokens=8).to(PRECISIONS[precision].dtype)
    adapter, sizes = problem.adapter(), (3, 2, *problem.weight.shape, 8)
    factors = "fp32" if precision == "tf32" else precision

    def chosen(stage: str, x: torch.Tensor) -> str:
        return triton_backend._chosen(stage, x, adapter, operands_of(adapter))

    with multiplied_in(precision):
        for stage, x in (("forward", problem.x), ("input_gradient", problem.dy)):
            assert chosen(stage, x) == "fused"
            put("merged", Key(stage, precision, *sizes, factors=factors))
            assert chosen(stage, x) == "merged"


# Damaged tables


@pytest.mark.parametrize("entry", [3, [1], "t=64", {"choice": "t=1"}, {"choice": 10**400}], ids=str)
def test_a_bad_entry_is_named_when_it_is_asked_for_and_stays(entry: object, path: Path) -> None:
    put(LAST, KEY._replace(tokens=16))
    keep(CPU, "choices", {str(KEY): entry})
    words = f"{path}: permute fp32 .* has no choice .*; it is not used"
    with pytest.warns(UserWarning, match=words) as caught:
        assert ask() == FIRST
    assert len(caught) == 1
    assert len(str(caught[0].message)) < 500 + len(str(path))
    put(THIRD, KEY._replace(tokens=32))  # another version may understand the entry
    assert kept()[str(KEY)] == entry


@pytest.mark.parametrize("machine", [3, [], {"choices": 3}, {"choices": [], "verdicts": {}}], ids=str)
def test_what_a_machine_measured_may_be_damaged(machine: object, path: Path) -> None:
    path.write_text(json.dumps({identity(CPU): machine, "other": machine}))
    assert ask() == FIRST
    put()
    assert ask() == SECOND
    assert json.loads(path.read_text())["other"] == machine


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b'{"schema": ' + b"[" * 100_000, "is not JSON"),
        (b"[1, 2]", "is not a table of smoa-kernels"),
    ],
    ids=str,
)
def test_a_file_that_is_no_table_is_named_and_set_aside_by_the_next_writer(
    text: bytes, words: str, path: Path, said: Callable[[Path], str]
) -> None:
    path.write_bytes(text)
    with pytest.warns(UserWarning, match=f"{path} .*{words}; it is not used") as caught:
        assert ask() == FIRST
    assert len(caught) == 1
    assert words in said(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # reading moves no file
    with pytest.warns(UserWarning, match=f"{words}; set aside as cpu.broken"):
        put()
    assert ask() == SECOND
    assert path.with_suffix(".broken").read_bytes() == text
    assert said(path.with_suffix(".broken")) == "set aside, not used"


def test_a_folder_in_the_tables_place(path: Path) -> None:
    path.mkdir()
    with pytest.warns(UserWarning, match="cannot be read: .* Is a directory"):
        assert ask() == FIRST
    with pytest.raises(OSError, match="Is a directory"):
        put()


def test_info_says_what_runs_on_a_gpu_and_why(path: Path, said: Callable[[Path], str]) -> None:
    put("split", FORWARD)
    keep(CPU, "choices", {"input_gradient": 3})
    rows = info._kernels()
    words = "fused up to 64 (bf16), 64 (fp16), 32 (tf32), 16 (fp32) tokens (ρ up to 64, in fp32 16), where reading W0"
    assert rows["cpu, algorithm by rule"].startswith(words)
    assert rows["cpu, algorithm by its table"] == f"{FORWARD}: split"
    assert rows["cpu, identity"] == identity(CPU)
    assert said(path) == f"{TODAY}; 2 keys in force, 0 measured with other versions"
    other = path.rename(user_table("NVIDIA H100"))
    assert said(other) == f"{TODAY}; for a GPU that is not here"
    assert info._tables()["cpu"] == "no table: the heuristic chooses; smoa-kernels tune measures"


# Concurrent writers


WRITING = """
{before}
from tuning.test_table import KEY, put
for step in range(20):
    put(key=KEY._replace(tokens=1 << step, blocks=1))
    put(key=KEY._replace(tokens=1 << step, blocks={own}))
"""


@pytest.mark.slow
def test_two_processes_write_into_one_table() -> None:
    """Both write the same problems and some of their own, and each first reads the other's entries."""
    processes = [python(WRITING.format(before="", own=own)) for own in (2, 3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    keys = (KEY._replace(blocks=n, tokens=1 << step) for n in (1, 2, 3) for step in range(20))
    assert set(kept()) == set(map(str, keys))


def test_kill_in_the_middle_of_a_write(path: Path) -> None:
    """Killed when the new file is written but not renamed, with the lock held."""
    put()
    before = path.read_text()
    stopped = "import os, time\nos.replace = lambda a, b: (print('writing', flush=True), time.sleep(60))\n"
    kill_at(python(WRITING.format(before=stopped, own=7)), "writing")
    assert path.read_text() == before
    put(key=KEY._replace(tokens=16))  # the killed process's lock is free
    assert set(kept()) == {str(KEY), str(KEY._replace(tokens=16))}
