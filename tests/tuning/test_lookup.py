"""Which choice is in force: user's table, shipped table, heuristic; when something is timed, and by whom."""

import json
import os
import socket
import subprocess
import sys
import timeit
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from problems import LinearProblem, make_problem
from tuning_cases import CPU, FORWARD, PERMUTE, entry, needs_interpreter, permute_entry, scripted

from smoa_kernels import triton_backend
from smoa_kernels.kernels import selection
from smoa_kernels.kernels.heuristic import Key
from smoa_kernels.kernels.launch import PERMUTE_CONFIGS
from smoa_kernels.kernels.permute import gather_columns
from smoa_kernels.partition import BlockPartition
from smoa_kernels.tuning import autotune, identity, lookup, store
from smoa_kernels.tuning.entries import Choice
from smoa_kernels.tuning.store import read, update, user_table

pytestmark = needs_interpreter

FIRST, SECOND, THIRD = PERMUTE_CONFIGS


def ask() -> object:
    return selection.select("permute", CPU, torch.float32, blocks=2, in_features=12, tokens=8, padded_in=64)


def test_without_tables_the_heuristic_answers(cache: Path) -> None:
    assert ask() == FIRST
    assert not cache.exists()


def test_the_users_table_comes_before_the_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "shipped")
    update(tmp_path / "shipped" / "cpu.json", [entry(seconds={THIRD: 1.0})])
    assert ask() == THIRD
    update(user_table("cpu"), [permute_entry()])
    assert ask() == THIRD  # read once per process
    lookup.forget()
    assert ask() == SECOND


def test_another_problem_does_not_borrow_an_entry() -> None:
    update(
        user_table("cpu"),
        [permute_entry(PERMUTE._replace(tokens=16)), permute_entry(PERMUTE._replace(blocks=3))],
    )
    assert ask() == FIRST


@pytest.mark.parametrize(
    "changed",
    [
        {"gpu": "another"},
        {"capability": "sm_90"},
        {"multiprocessors": 66},
        {"torch": "1.0"},
        {"triton": "2.0"},
        {"source": "edited"},
    ],
    ids=str,
)
def test_a_stale_entry_is_not_used_and_says_why(changed: dict[str, object]) -> None:
    stale = permute_entry(**changed)
    update(user_table("cpu"), [stale])
    assert ask() == FIRST
    (reason,) = identity.staleness(stale.identity, identity.identity(CPU, "permute"))
    ((name, value),) = changed.items()
    assert reason.startswith(f"{name}: {value} then, ")


def test_any_edit_of_a_kernels_source_makes_its_entries_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Path(identity.__file__).resolve().parent.parent
    for path in (*(package / "kernels").glob("*.py"), package / "triton_backend.py"):
        copy = tmp_path / path.relative_to(package)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    monkeypatch.setattr(identity, "_PACKAGE", tmp_path)
    fresh = identity.source_hash.__wrapped__

    def hashes() -> dict[str, str]:
        return {kernel: fresh(kernel) for kernel in ("permute", "block_grad", "forward")}

    before = hashes()
    with (tmp_path / "kernels" / "permute.py").open("a") as stream:
        stream.write("# edited\n")
    edited = hashes()
    assert {kernel for kernel in before if before[kernel] != edited[kernel]} == {"permute", "forward"}
    with (tmp_path / "kernels" / "_common.py").open("a") as stream:
        stream.write("# edited\n")
    assert all(edited[kernel] != value for kernel, value in hashes().items())


def test_a_launch_uses_what_was_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    update(user_table("cpu"), [permute_entry()])
    labels = torch.arange(12) % 2
    p = BlockPartition.from_labels(labels, labels, 2)
    launched: list[object] = []

    class Recorder:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *args, **options: launched.append((options["BLOCK_T"], options["BLOCK_P"]))

    monkeypatch.setattr("smoa_kernels.kernels.permute.permute_kernel", Recorder())
    gather_columns(torch.zeros(5, 12), p.col_index, p.col_offsets, 64)
    assert launched == [(SECOND.block_t, SECOND.block_p)]


def forward_entry(dtype: str, kernel: str = "forward") -> None:
    problem = make_problem(ranks=(3, 2), tokens=8)
    key = Key(kernel, dtype, 3, 2, *problem.weight.shape, 8)
    names = ("merged", "split", "fused") if kernel == "forward" else ("merged", "fused")
    update(user_table("cpu"), [entry(key, seconds={name: float(i + 1) for i, name in enumerate(names)})])
    lookup.forget()


@pytest.mark.parametrize(
    ("dtype", "precision", "dropout", "expected"),
    [
        (torch.bfloat16, "none", False, "split"),
        (torch.float16, "none", False, "split"),
        (torch.float32, "tf32", False, "split"),
        (torch.float32, "ieee", False, "merged"),
        (torch.float32, "ieee", True, "split"),
    ],
)
def test_a_table_never_chooses_what_breaks_the_numbers(
    dtype: torch.dtype, precision: str, dropout: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "merged" was measured fastest in all of them: it is taken where W_eff keeps its bits, and under no dropout."""
    for name in ("bf16", "fp16", "tf32", "fp32"):
        forward_entry(name)
    problem = make_problem(ranks=(3, 2), tokens=8).to(dtype)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        taken = taken_by(problem, monkeypatch, dropout_p=0.3 if dropout else 0.0)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert taken["forward"] == expected


def taken_by(problem: LinearProblem, monkeypatch: pytest.MonkeyPatch, **options: object) -> dict[str, str]:
    """The algorithms that a training step ran, seen by the kernels it called."""
    calls: list[str] = []
    for name in ("modulated_weight", "fused_linear", "block_matmul"):
        original = getattr(triton_backend, name)

        def seen(
            *args: object, name: str = name, original: Callable[..., object] = original, **kwargs: object
        ) -> object:
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(triton_backend, name, seen)
    if options.get("dropout_p"):
        options["dropout_seed"] = torch.tensor(3)
    problem.run(backend="triton", **options)
    names = {"modulated_weight": "merged", "fused_linear": "fused", "block_matmul": "split"}
    return {"forward": names[calls[0]], "input_gradient": names[calls[-1]]}


def test_measured_winners_replace_the_cost_models_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(ranks=(3, 2), tokens=8).to(torch.bfloat16)
    assert taken_by(problem, monkeypatch) == {"forward": "fused", "input_gradient": "fused"}  # as predicted
    forward_entry("bf16")
    forward_entry("bf16", "input_gradient")
    assert taken_by(problem, monkeypatch) == {"forward": "split", "input_gradient": "merged"}


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
    assert read(user_table("cpu"))[PERMUTE].complete
    monkeypatch.delenv("SMOA_AUTOTUNE")
    autotune.measured.cache_clear()
    lookup.forget()
    ask()  # from the table
    assert len(timed) == 3


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


RANK = """
import os, sys
sys.path[:0] = [{here!r}]
from datetime import timedelta
import torch, torch.distributed as dist
from tuning_cases import scripted
from smoa_kernels.kernels import selection
from smoa_kernels.kernels.launch import PERMUTE_CONFIGS
from smoa_kernels.tuning import autotune, lookup
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
autotune.WAIT = timedelta(seconds=0.3)
alone = ask(16) if rank == 1 else None
dist.barrier()
print(PERMUTE_CONFIGS.index(shared), len(timed), alone == PERMUTE_CONFIGS[0])
dist.destroy_process_group()
"""


def test_autotune_runs_on_rank_0_and_all_ranks_take_its_choice(tmp_path: Path) -> None:
    """No shared disk; and a problem that only rank 1 has makes it wait a moment, not for ever."""
    here = Path(__file__).resolve().parent
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = RANK.format(here=str(here))
    environment = os.environ | {"SMOA_AUTOTUNE": "1", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(port), str(tmp_path / "cache")],
            stdout=subprocess.PIPE,
            text=True,
            cwd=here.parents[1],
            env=environment,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=90)[0].split() for process in processes]
    assert outputs == [["2", "3", "False"], ["2", "0", "True"]]
    assert not (tmp_path / "cache1").exists()


def test_another_gpu_than_rank_0s_goes_by_its_own_heuristic() -> None:
    class Store:
        def wait(self, names: list[str], timeout: object) -> None:
            pass

        def get(self, name: str) -> str:
            return json.dumps(permute_entry(capability="sm_90").to_json())

    assert autotune._published(Store(), "any", PERMUTE, CPU) is None


def test_an_answer_from_the_cache_takes_microseconds() -> None:
    """A lookup is a tuple and a dictionary; the bound is an order of magnitude above what it takes here."""
    ask()
    assert min(timeit.repeat(ask, number=2000, repeat=5)) / 2000 < 50e-6


def test_a_forward_key_is_no_kernels(cache: Path) -> None:
    update(user_table("cpu"), [entry(FORWARD, seconds={"split": 1.0})])
    assert lookup.tuned_config(FORWARD, CPU) is None
    assert lookup.tuned_algorithm(FORWARD, CPU, ("split", "fused")) == "split"
    assert replace(permute_entry(), trials=()).best() is None
