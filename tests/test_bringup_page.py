"""What a bring-up compares, its goals, its page and its file (benchmarks/bringup)."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bringup_cases import MACHINE, layer, measured

from benchmarks.bringup import stages
from benchmarks.bringup.cases import GOAL_CASES, SHAPES, SQUARE, comparison_cases, tuned_layers
from benchmarks.bringup.goals import COLUMNS, GOALS
from benchmarks.bringup.page import page
from benchmarks.bringup.state import ROOT, State, path_of
from benchmarks.providers import FROZEN, HIRA, LORA, PAPER, SMOA
from benchmarks.report import page as report_page
from benchmarks.results import Result, Run, read
from smoa_kernels.cost.gpus import GPUS
from smoa_kernels.kernels.entries import Entry, Trial
from smoa_kernels.kernels.heuristic import Key
from smoa_kernels.kernels.identity import identity
from smoa_kernels.tuning.plan import keys

pytestmark = pytest.mark.slow

H100 = GPUS["h100"]


def test_the_grid_is_the_one_that_was_asked_for_and_the_goals_come_first() -> None:
    cases = comparison_cases(False)
    assert cases[: len(GOAL_CASES)] == GOAL_CASES
    assert len(cases) == 72
    assert {(c.out_features, c.in_features) for c in cases} == set(SHAPES)
    assert {c.tokens for c in cases} == {256, 2048, 8192}
    assert {c.num_blocks for c in cases} == {1, 2, 4, 8}
    assert {c.dropout for c in cases} == {0.0, 0.05}
    assert {(c.rank, c.dtype) for c in cases} == {(16, torch.bfloat16)}
    assert len(tuned_layers(False)) == 9
    distinct = {key for one in tuned_layers(False) for key in keys(one)}
    assert f"{len(distinct)} keys in all" in (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")


def test_who_is_compared() -> None:
    assert set(stages.providers(SQUARE)) == {
        FROZEN,
        LORA,
        HIRA,
        PAPER,
        SMOA,
        f"{SMOA} merged",
        f"{SMOA} split",
    }
    assert f"{SMOA} merged" not in stages.providers(replace(SQUARE, dropout=0.05))


def test_goals_stand_with_the_prediction_and_what_was_measured() -> None:
    state, column = measured(), COLUMNS[0]
    rows = [goal.row(column, goal.limits[0], H100, state) for goal in GOALS]
    assert [goal.met(row) for goal, row in zip(GOALS, rows, strict=True)] == [
        True,
        False,
        True,
        True,
        True,
        False,
        True,
        True,
    ]
    assert rows[0].measured == pytest.approx(1.3 / 1.4)
    assert rows[0].predicted == pytest.approx(0.91, abs=0.01)
    assert rows[6].measured == pytest.approx(0.8)
    assert rows[6].predicted == pytest.approx(0.50, abs=0.005)
    assert rows[7].measured == 0.7
    assert rows[7].predicted == pytest.approx(0.79, abs=0.01)
    for goal in GOALS:
        assert goal.row(COLUMNS[1], goal.limits[1], H100, state).measured is None


def test_the_documentation_shows_each_goal_with_its_prediction() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    nothing = State(Run(MACHINE, "abc", "", ()))
    for goal in GOALS:
        rows = [goal.row(c, limit, H100, nothing) for c, limit in zip(COLUMNS, goal.limits, strict=True)]
        sign = "≥" if goal.share else "≤"
        cells = [f"{sign} {row.goal:.2f} | {row.predicted:.2f}" for row in rows]
        assert f"| {goal.text} | {' | '.join(cells)} |" in text


def test_an_unsteady_machine_is_not_judged() -> None:
    shaky = {FROZEN: [1.0, 2.0, 3.0], LORA: [1.0] * 3, f"{SMOA} merged": [0.5] * 3}
    result = Result("layer", "x", SQUARE.record(), FROZEN, [0.0, 0.0], {"both": shaky})
    row = GOALS[0].row(COLUMNS[0], 1.0, H100, State(Run(MACHINE, "abc", "", (result,))))
    assert row.measured == 0.5
    assert GOALS[0].met(row) is None


def test_the_page_marks_every_figure(tmp_path: Path) -> None:
    state = measured().with_stage("tests", status="failed", seconds=3.0, error="1 failures | the first")
    files = {
        "a.py": {"status": "failed", "counts": {"passed": 3, "failed": 1}, "failures": ["a.py::b"]},
        "b.py": {"status": "out of time", "counts": {"passed": 1}, "selected": 7, "failures": []},
    }
    state = state.with_finding("tests", files)
    text = page(state)
    (merged,) = (line for line in text.splitlines() if line.startswith("| fwd+bwd over PEFT LoRA, merged"))
    assert merged.endswith("| ≤ 1.00 | 0.91 | 0.93, met | ≤ 1.10 | 1.01 | not measured |")
    (split,) = (line for line in text.splitlines() if line.startswith("| fwd+bwd over PEFT LoRA, split"))
    assert "1.25, missed" in split
    assert "| block_grad, share of the measured matmul rate | ≥ 0.65 | 0.79 | 0.70, met |" in text
    assert "measured on GPU NVIDIA H100 80GB HBM3" in text
    assert "1 failed, 4 passed, in 2 files." in text
    assert "Not finished in time: b.py (1 of 7 tests ran)." in text
    assert "- failed: `a.py::b`" in text
    assert "700 TFLOP/s" in text
    assert "| tests | failed | 3 | 1 failures / the first |" in text


def test_the_page_shows_every_algorithm_and_where_it_gathers() -> None:
    key = Key("forward", "bf16", 4, 4, 4096, 4096, 8192)
    trials = (Trial("split", 2e-4), Trial("merged", 1e-4), Trial("fused", reason="why"))
    entry = Entry(key, identity(torch.device("cpu"), "forward"), "split", trials, complete=True)
    finding = {"table": {"entries": [json.loads(json.dumps(entry.to_json()))]}, "problems": {}}
    text = page(measured().with_finding("tune", finding))
    problem = "forward 4096x4096 T≤8192 ρ=4 K=4 bf16"
    assert f"- {problem}: split (gather before) 200.0 µs, merged (no gather) 100.0 µs" in text
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {problem}"))
    assert row.endswith(
        "| 200.0 | 200.0 | split (gather before) |"
    )  # merged is no choice in bf16, however fast


def test_a_page_of_nothing() -> None:
    text = page(State(Run(MACHINE, "abc", "2026-01-01", ())))
    assert text.count("not measured") == 2 * len(GOALS)
    assert "Nothing was compared." in text


def test_the_file_comes_back_and_is_a_run_of_the_suite(tmp_path: Path) -> None:
    state = measured().with_stage("compare", status="done", seconds=1.0, error="")
    path = path_of(tmp_path, state.run)
    assert path.name == "bringup-gpu-nvidia-h100-80gb-hbm3.json"
    state.write(path)
    again = State.read(path)
    assert again.stages == state.stages
    assert again.findings == state.findings
    assert page(again) == page(state)
    assert "measured on GPU NVIDIA H100 80GB HBM3" in report_page([read(path)])


@pytest.mark.parametrize("text", ["{", "[]", '{"results": []}'])
def test_a_file_that_is_no_bring_up(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"x\.json is not a bring-up"):
        State.read(path)


def test_a_second_comparison_takes_the_place_of_the_first() -> None:
    state = State(Run(MACHINE, "abc", "", ())).with_results(layer(SQUARE, frozen=1.0))
    (kept,) = state.with_results(layer(SQUARE, frozen=2.0)).run.results
    assert kept.seconds["both"]["frozen"][0] == 2.0
