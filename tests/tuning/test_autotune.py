"""`SMOA_AUTOTUNE=1`: when something is timed, on which rank, for how long, and who hears of it."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from problems import make_problem
from tuning_cases import CPU, FORWARD, PERMUTE, entry, kept, needs_interpreter, permute_entry, scripted

from smoa_kernels.kernels import lookup, selection
from smoa_kernels.kernels.entries import Choice
from smoa_kernels.kernels.heuristic import CONFIGS
from smoa_kernels.kernels.launch import PERMUTE_CONFIGS
from smoa_kernels.kernels.store import update, user_table
from smoa_kernels.tuning import autotune
from smoa_kernels.tuning.autotune import Budget

pytestmark = needs_interpreter

FIRST, SECOND, THIRD = PERMUTE_CONFIGS


def ask(tokens: int = 8) -> object:
    sizes = {"blocks": 2, "in_features": 12, "tokens": tokens, "padded_in": 64}
    return selection.select("permute", CPU, torch.float32, **sizes)


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[Choice]:
    timed: list[Choice] = []

    def seconds(choice: Choice) -> float:
        timed.append(choice)
        return float(len(timed))

    monkeypatch.setattr(autotune, "timer", scripted(seconds))
    return timed


@pytest.mark.parametrize("value", [None, "0", "", "true"])
def test_nothing_is_timed_unless_asked(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = count_calls(monkeypatch)
    if value is not None:
        monkeypatch.setenv("SMOA_AUTOTUNE", value)
    make_problem(tokens=5, dtype=torch.float32).run(backend="triton")
    assert timed == []
    assert not user_table("cpu").exists()


def test_autotune_measures_each_problem_once_and_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = count_calls(monkeypatch)
    monkeypatch.setenv("SMOA_AUTOTUNE", "1")
    assert ask() == FIRST  # the script makes the first the fastest
    assert timed == [FIRST, SECOND, THIRD]
    selection.forget()
    ask()
    assert len(timed) == 3
    assert kept()[PERMUTE].complete
    monkeypatch.delenv("SMOA_AUTOTUNE")
    autotune.measured.cache_clear()
    lookup.forget()
    ask()  # from the table
    assert len(timed) == 3


def test_autotune_goes_on_where_an_earlier_run_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A default that was compared with nothing is no choice."""
    timed = count_calls(monkeypatch)
    update(user_table("cpu"), [entry(seconds={FIRST: 9.0}, complete=False)])
    assert ask() == FIRST
    assert timed == []
    monkeypatch.setenv("SMOA_AUTOTUNE", "1")
    selection.forget()
    assert ask() == SECOND
    assert timed == [SECOND, THIRD]
    assert kept()[PERMUTE].complete


def test_algorithms_are_compared_however_long_their_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel may take what an algorithm may; all of them are measured before it, in their own time."""
    clock, timed = [0.0], []

    def seconds(choice: Choice) -> float:
        timed.append(choice)
        clock[0] += 1 if isinstance(choice, str) else 0.9 * autotune.SECONDS
        return {"merged": 3.0, "split": 2.0, "fused": 1.0}[choice] if isinstance(choice, str) else 1.0

    monkeypatch.setenv("SMOA_AUTOTUNE", "1")
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(autotune, "timer", scripted(seconds))
    assert lookup.tuned_algorithm(FORWARD, CPU, ("split", "fused")) == "fused"
    assert set(timed[-3:]) == {"split", "merged", "fused"}
    assert kept()[FORWARD].complete
    assert {key.kernel for key in kept()} & set(CONFIGS)


def test_what_is_first_asked_under_capture_is_measured_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = count_calls(monkeypatch)
    monkeypatch.setenv("SMOA_AUTOTUNE", "1")
    allowed = ("split", "fused")
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_available", lambda: True)
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert ask() == FIRST
        assert lookup.tuned_algorithm(FORWARD, CPU, allowed) is None
        assert timed == []
    ask()
    assert timed == [FIRST, SECOND, THIRD]
    assert lookup.tuned_algorithm(FORWARD, CPU, allowed) is not None


def test_autotune_that_fails_leaves_the_heuristic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_AUTOTUNE", "1")
    monkeypatch.setattr(autotune, "timer", scripted(lambda choice: 1 / 0))
    assert ask() == FIRST
    assert not user_table("cpu").exists()


def test_autotune_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_AUTOTUNE", "1")
    monkeypatch.setenv("SMOA_CACHE", os.devnull)
    count_calls(monkeypatch)
    with pytest.warns(UserWarning, match="cannot be read"), pytest.warns(UserWarning, match="is not kept"):
        assert ask() == FIRST


def test_rank_0_measures_no_longer_than_the_others_can_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def seconds(choice: Choice) -> float:
        clock[0] += 30
        return 1.0

    monkeypatch.setenv("SMOA_AUTOTUNE", "1")
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(autotune, "timer", scripted(seconds))
    monkeypatch.setattr(autotune, "measuring", Budget(50.0))
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        ask(8)
        ask(16)
        with pytest.warns(
            UserWarning, match="the time of this run is spent; permute is measured in the next"
        ):
            ask(32)
    finally:
        dist.destroy_process_group()
    assert clock == [60.0]  # one candidate each of two problems
    assert {key.tokens for key in kept()} == {8, 16}


class Waiting:
    """Rank 1's view of a real store under a scripted clock; rank 0 writes into it at given times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.store, self.later = 0.0, dist.HashStore(), {}  # type: ignore[var-annotated]
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)
        monkeypatch.setattr(autotune, "waiting", Budget(60.0))

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for when in [when for when in self.later if when <= self.now]:
            self.store.set(*self.later.pop(when))

    def published(self, name: str) -> object:
        return autotune._published(self.store, name, PERMUTE, CPU)


def test_a_rank_waits_a_minute_in_all_for_what_rank_0_has_not_come_across(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rank = Waiting(monkeypatch)
    for name in ("first", "second", "third"):
        assert rank.published(name) is None
    assert 60 <= rank.now < 61


def test_a_rank_waits_longer_where_rank_0_is_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Waiting(monkeypatch)
    rank.later = {
        10.0: ("first asked", ""),
        200.0: ("first found", json.dumps(permute_entry().to_json())),
    }
    assert rank.published("first") == permute_entry()
    assert 200 <= rank.now < 201
    assert autotune.waiting.left > 49  # the rest was rank 0's time
    rank.store.set("second asked", "")
    assert rank.published("second") is None  # rank 0 died at it
    assert rank.now < 600  # after which NCCL gives up


@pytest.mark.parametrize("changed", [{"capability": "sm_90"}, {"gpu": "another"}], ids=str)
def test_another_gpu_than_rank_0s_goes_by_its_own_heuristic(changed: dict[str, object]) -> None:
    store = dist.HashStore()
    store.set("any asked", "")
    store.set("any found", json.dumps(permute_entry(**changed).to_json()))
    assert autotune._published(store, "any", PERMUTE, CPU) is None


RANK = """
import os, sys
sys.path[:0] = [{here!r}]
import torch, torch.distributed as dist
from tuning_cases import scripted
from smoa_kernels.kernels import selection
from smoa_kernels.kernels.launch import PERMUTE_CONFIGS
from smoa_kernels.tuning import autotune
from smoa_kernels.kernels import lookup
rank = int(sys.argv[1])
os.environ |= {{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2], "SMOA_CACHE": sys.argv[3] + str(rank)}}
lookup.install()
dist.init_process_group("gloo", rank=rank, world_size=2)
timed = []
def seconds(choice):
    timed.append(choice)
    return float(choice != PERMUTE_CONFIGS[2]) + 1
autotune.timer = scripted(seconds)
def ask(tokens):
    cpu = torch.device("cpu")
    return selection.select("permute", cpu, torch.float32, blocks=2, in_features=12, tokens=tokens, padded_in=64)
shared = ask(8)
autotune.waiting.left = 0.3
alone = ask(16) if rank == 1 else None
dist.barrier()
print(PERMUTE_CONFIGS.index(shared), len(timed), alone == PERMUTE_CONFIGS[0])
dist.destroy_process_group()
"""


def two_ranks(caches: Path) -> list[list[str]]:
    """What each of two processes printed, their cache folders `caches`0 and `caches`1."""
    here = Path(__file__).resolve().parent
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = RANK.format(here=str(here))
    environment = os.environ | {"SMOA_AUTOTUNE": "1", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(port), str(caches)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=here.parents[1],
            env=environment,
        )
        for rank in range(2)
    ]
    return [process.communicate(timeout=90)[0].split() for process in processes]


def test_autotune_runs_on_rank_0_and_all_ranks_take_its_choice(tmp_path: Path) -> None:
    """No shared disk; and a problem that only rank 1 has makes it wait a moment, not for ever."""
    assert two_ranks(tmp_path / "cache") == [["2", "3", "False"], ["2", "0", "True"]]
    assert not (tmp_path / "cache1").exists()


def test_what_rank_0_has_in_its_table_is_every_ranks_choice(tmp_path: Path) -> None:
    """No shared disk, and the second run: rank 0 need measure nothing, rank 1 has an empty cache."""
    update(tmp_path / "cache0" / "tuning" / user_table("cpu").name, [permute_entry()])
    assert two_ranks(tmp_path / "cache") == [["1", "0", "False"], ["1", "0", "True"]]
