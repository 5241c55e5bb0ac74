"""The benchmarks: ratios of pairs, gates, exact memory, comparisons, and published pages against the kept runs.

`make bench-smoke` runs every benchmark on tiny sizes and writes its report.
"""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import nn

from benchmarks import machine
from benchmarks.compare import LEAST, changes, goals
from benchmarks.gate import RedGateError, check_layers
from benchmarks.goals import GOALS
from benchmarks.memory import allocated, footprint
from benchmarks.models import adapter_configs
from benchmarks.protocol import DEVICE, Comparison, Figure, Turns
from benchmarks.providers import CONTIGUOUS, FROZEN, LORA, SMOA, Case, frozen, lora, smoa
from benchmarks.readme import README, section, with_section
from benchmarks.report import main, page
from benchmarks.results import RESULTS, Result, compact, read_all
from benchmarks.test_layer import training_pass
from benchmarks.test_model_step import adapted, check_gradients
from benchmarks.test_setup import centroids, check
from smoa_kernels import BlockPartition

pytestmark = pytest.mark.slow

NAP = 0.5  # seconds; everything else here is short beside it, even on a busy machine
CASE = Case(24, 96, 80, 4, 16)

# The protocol


def test_a_ratio_is_taken_within_its_round() -> None:
    # The machine slows down fivefold: the ratio of medians would be 2·4/2 = 4, but each round's is 2.
    drifting = Comparison(
        "base", {"base": [1.0, 2.0, 5.0], "ours": [2.0, 4.0, 10.0], "lora": [1.0, 4.0, 5.0]}
    )
    assert drifting.ratio("ours") == Figure(2.0, 2.0, 2.0, "noisy")
    assert drifting.ratio("ours", "lora").median == 2.0
    assert drifting.spread == pytest.approx((3.5 - 1.5) / 2.0)
    # The quartiles of [1, 1, 1, h, h] are 1 and h; the median is 1.
    for high, doubt in ((1.14, ""), (1.16, "noisy")):
        assert Comparison("base", {"base": [1.0, 1.0, 1.0, high, high]}).doubt == doubt


def test_providers_take_turns_in_an_order_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.protocol.SHORT", 0.0)
    calls: list[str] = []

    def run(name: str) -> dict[str, float]:
        calls.append(name)
        return {"forward": float(len(calls))}

    turns = Turns({name: lambda name=name: run(name) for name in "abc"}, "a")
    turns.warm_up(2)
    assert calls == list("abcabc")
    calls.clear()
    for _ in range(20):
        turns.round()
    rounds = ["".join(calls[i : i + 3]) for i in range(0, 60, 3)]
    # Each provider runs once a round, and directly after each other one in some round.
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    pairs = {pair for each in rounds for pair in (each[:2], each[1:])}
    assert pairs == {a + b for a in "abc" for b in "abc" if a != b}
    found = turns.comparisons()["forward"].seconds
    assert found["b"] == [3 * i + each.index("b") + 1 for i, each in enumerate(rounds)]


def test_a_backward_is_timed_without_its_forward() -> None:
    class SlowForward(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(NAP)
            return super().forward(x)

    found = training_pass(SlowForward(80, 96, device=DEVICE).requires_grad_(False), CASE)()
    assert found["forward"] >= NAP > found["backward"]
    assert found["both"] == found["forward"] + found["backward"]


# Gates


@pytest.mark.parametrize(
    "build", [frozen, lora, smoa(), smoa(block_order="contiguous")], ids=[FROZEN, LORA, SMOA, CONTIGUOUS]
)
def test_a_wrong_output_turns_the_gate_red(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build(CASE)
    right = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x: right(x) * 1.001)
    with pytest.raises(RedGateError, match=r"T=24 96x80 .*: y of wrong errs by"):
        check_layers(CASE, {"wrong": layer})


def test_a_wrong_gradient_or_mask_turns_the_gate_red() -> None:
    layer, dropped = smoa()(CASE), smoa(backend="eager")(replace(CASE, dropout=0.5))
    layer.smoa.B.register_hook(lambda gradient: gradient * 1.001)
    for case, wrong, said in ((CASE, layer, "dB"), (replace(CASE, dropout=0.05), dropped, "y")):
        with pytest.raises(RedGateError, match=f"{said} of wrong"):
            check_layers(case, {"wrong": wrong})


def test_a_models_wrong_gradient_turns_the_gate_red() -> None:
    models = {name: adapted(config, smoke=True) for name, config in adapter_configs(2).items()}
    tokens = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    check_gradients(models, tokens)
    factor = next(p for n, p in models[SMOA].named_parameters() if n.endswith(".B"))
    factor.register_hook(lambda gradient: gradient * 1.01)
    with pytest.raises(RedGateError, match=f"gradients of {SMOA} err by"):
        check_gradients(models, tokens)


def test_a_row_in_the_wrong_block_turns_the_partitions_gate_red() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    partition = BlockPartition.from_weight(weight, 4)
    exact = torch.linalg.svd(weight.double(), full_matrices=False)
    check(partition, *exact)
    rows, score = partition.row_block.clone(), centroids(exact.U, exact.S)
    ends = torch.stack([score.argmin(), score.argmax()])
    rows[ends] = rows[ends.flip(0)]
    with pytest.raises(RedGateError, match="2 rows are in another block"):
        check(BlockPartition.from_labels(rows, partition.col_block, 4), *exact)


def test_allocations_are_counted_to_the_byte() -> None:
    kept = []

    def allocate() -> None:
        kept.append(torch.empty(3 << 20, dtype=torch.uint8, device=DEVICE))
        torch.empty(2 << 20, dtype=torch.uint8, device=DEVICE)
        kept.append(torch.empty(1 << 20, dtype=torch.uint8, device=DEVICE))

    assert allocated(allocate) == (5 << 20, 4 << 20)
    kept_bytes = sum(t.nbytes for t in kept)
    assert allocated(kept.clear) == (0, -kept_bytes)
    y_and_dx = 4 * 24 * 96 + 4 * 24 * 80
    expected = {"saved": 0, "peak": y_and_dx, "forward_workspace": 0, "backward_workspace": 0}
    assert footprint(frozen(CASE), CASE) == expected


# Pages and comparisons


def test_readme_and_results_agree_with_the_kept_runs() -> None:
    runs = read_all(RESULTS)
    text = README.read_text(encoding="utf-8")
    assert text == with_section(text, section(runs)), "run `python -m benchmarks.report`"
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == page(runs), "the same"
    assert not [goal.text for goal in GOALS if not any(goal.measure(run) for run in runs)]


def test_what_is_no_measurement_is_not_kept(tmp_path: Path) -> None:
    """A smoke run, another tool's file, an interrupted job, and one with options of its own."""
    run = read_all(RESULTS)[0]
    job = json.loads((RESULTS / "main-job" / "smoa.json").read_text(encoding="utf-8"))["summary"]
    for text, words in (
        (compact(replace(run, machine={**run.machine, "smoke": True})), "a --smoke run measures nothing"),
        ('{"benchmarks": []}', "is not a run of this benchmark suite"),
        (json.dumps(job | {"status": "interrupted"}), "its status is 'interrupted'"),
        (json.dumps(job | {"options": job["options"] | {"lr": 0.1}}), "not run as `make finetune` runs it"),
    ):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises((typer.BadParameter, ValueError), match=words):
            main([tmp_path / "run.json"])


@pytest.mark.parametrize(
    ("new", "changed", "doubtful"),
    [
        (Figure(1.05, 1.06, 1.07), 0, 0),  # no overlap, but only 4 %
        (Figure(0.90, 1.12, 1.14), 0, 0),  # 10 %, but the ranges overlap
        (Figure(1.11, 1.12, 1.13), 1, 0),
        (Figure(0.90, 0.91, 0.92), 1, 0),
        (Figure(0.90, 0.91, 0.92, "noisy"), 0, 1),
    ],
)
def test_a_ratio_changed_where_ranges_are_apart_and_medians_more_than_five_percent(
    new: Figure, changed: int, doubtful: int
) -> None:
    name = ("layer", "both", SMOA)
    found, same, in_doubt = changes({name: Figure(1.00, 1.02, 1.04)}, {name: new}, LEAST)
    assert (len(found), same, in_doubt) == (changed, 1 - changed - doubtful, doubtful)


def test_goals_that_one_of_two_runs_misses_are_named() -> None:
    goal = next(goal for goal in GOALS if goal.what == "saved" and goal.limit == 1.0)
    run = read_all(RESULTS)[0]
    less, as_much, more = (
        replace(
            run, results=(Result("memory", goal.title, {}, bytes={SMOA: {"saved": n}, LORA: {"saved": 100}}),)
        )
        for n in (99, 100, 101)
    )
    for old, new, verdict in ((less, more, "missed"), (more, as_much, "met")):
        ((text, *_, found),) = goals(old, new)
        assert (text, found) == (goal.text, verdict)
    assert goals(less, as_much) == []


def test_a_commit_says_whether_code_was_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Larger results do not count as a change of code."""
    code, results = tmp_path / "benchmarks" / "code.py", tmp_path / "benchmarks" / "results" / "runs.jsonl"
    results.parent.mkdir(parents=True)
    for path in (code, results):
        path.write_text("1\n")
    for command in ("init -q", "add .", "-c user.name=a -c user.email=b commit -q -m c"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    monkeypatch.setattr(machine, "__file__", str(code))
    commit = machine.commit()
    results.write_text("2\n")
    assert machine.commit() == commit
    code.write_text("2\n")
    assert machine.commit() == commit + machine.EDITED
