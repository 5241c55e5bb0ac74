"""Which choice is in force: user's table, shipped table, heuristic."""

import timeit
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from problems import LinearProblem, make_problem
from tuning_cases import CPU, FORWARD, PERMUTE, entry, needs_interpreter, permute_entry

from smoa_kernels.backends import triton as triton_backend
from smoa_kernels.definition.partition import BlockPartition
from smoa_kernels.kernels import identity, lookup, selection, store
from smoa_kernels.kernels.heuristic import Key
from smoa_kernels.kernels.launch import PERMUTE_CONFIGS
from smoa_kernels.kernels.permute import gather_columns
from smoa_kernels.kernels.store import update, user_table

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


def test_two_environments_share_a_table() -> None:
    for added in (permute_entry(), entry(seconds={THIRD: 1.0}, torch="1.0")):
        update(user_table("cpu"), [added])
    assert ask() == SECOND


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


def test_an_answer_from_the_cache_takes_microseconds() -> None:
    """A lookup is a tuple and a dictionary; the bound is an order of magnitude above what it takes here."""
    ask()
    assert min(timeit.repeat(ask, number=2000, repeat=5)) / 2000 < 50e-6


def test_what_may_not_be_chosen_is_looked_for_in_the_next_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "shipped")
    update(user_table("cpu"), [entry(FORWARD, seconds={"merged": 1.0})])
    update(tmp_path / "shipped" / "cpu.json", [entry(FORWARD, seconds={"split": 2.0, "fused": 3.0})])
    assert lookup.tuned_algorithm(FORWARD, CPU, ("split", "fused")) == "split"


def test_a_forward_key_is_no_kernels(cache: Path) -> None:
    update(user_table("cpu"), [entry(FORWARD, seconds={"split": 1.0})])
    assert lookup.tuned_config(FORWARD, CPU) is None
    assert lookup.tuned_algorithm(FORWARD, CPU, ("split", "fused")) == "split"
    assert replace(permute_entry(), trials=()).best() is None
