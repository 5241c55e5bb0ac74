"""The benchmarks: ratios of pairs, gates, exact memory, and published pages against the kept runs.

`make bench-smoke` runs every benchmark on tiny sizes and writes its report.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from benchmarks.gate import RedGateError, check_layers
from benchmarks.goals import GOALS
from benchmarks.memory import allocated, footprint
from benchmarks.overview import drawn
from benchmarks.protocol import DEVICE, Comparison, Figure
from benchmarks.providers import CONTIGUOUS, FROZEN, LORA, SMOA, Case, frozen, lora, smoa
from benchmarks.readme import README, section, with_section
from benchmarks.report import goals, main, page
from benchmarks.results import RESULTS, ROOT, compact, read_all

pytestmark = pytest.mark.slow

CASE = Case(24, 96, 80, 4, 16)


def test_a_ratio_is_taken_within_its_round() -> None:
    # The machine slows down fivefold: the ratio of medians would be 2·4/2 = 4, but each round's is 2.
    seconds = {"base": [1.0, 2.0, 5.0], "ours": [2.0, 4.0, 10.0], "lora": [1.0, 4.0, 5.0]}
    drifting = Comparison("base", seconds)
    assert drifting.ratio("ours") == Figure(2.0, 2.0, 2.0, "noisy")
    assert drifting.ratio("ours", "lora").median == 2.0
    assert drifting.spread == pytest.approx((3.5 - 1.5) / 2.0)
    # The quartiles of [1, 1, 1, h, h] are 1 and h; the median is 1.
    for high, doubt in ((1.14, ""), (1.16, "noisy")):
        assert Comparison("base", {"base": [1.0, 1.0, 1.0, high, high]}).doubt == doubt


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


def test_readme_and_results_agree_with_the_kept_runs() -> None:
    runs = read_all(RESULTS)
    text = README.read_text(encoding="utf-8")
    assert text == with_section(text, section(runs)), "run `python -m benchmarks.report`"
    for name, written in (("README.md", page(runs)), ("goals.md", goals(runs))):
        assert (RESULTS / name).read_text(encoding="utf-8") == written, "the same"
    assert not [goal.text for goal in GOALS if not any(goal.measure(run) for run in runs)]


def test_the_pictures_show_the_kept_runs() -> None:
    for name, text in drawn().items():
        words = re.compile(r">([^<>]+)</text>")
        assert words.findall((ROOT / name).read_text(encoding="utf-8")) == words.findall(text), (
            "run `python -m benchmarks.overview`"
        )


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
