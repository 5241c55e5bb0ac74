"""The quality study: means and intervals, the choice of rates, and the page against the kept records."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from quality_cases import record

from benchmarks.quality import store
from benchmarks.quality.__main__ import RECORDS
from benchmarks.quality.analysis import Study, differences, mean_of, t_quantile
from benchmarks.quality.methods import BY_NAME
from benchmarks.quality.report import EQUALS, LORA, generate, page
from benchmarks.quality.study import best_rate
from benchmarks.quality.tasks import TASKS

pytestmark = pytest.mark.slow


def test_t_quantiles_are_those_of_the_tables() -> None:
    for freedom, expected in ((1, 12.7062), (4, 2.7764), (9, 2.2622), (30, 2.0423)):
        assert t_quantile(0.975, freedom) == pytest.approx(expected, abs=5e-5)


def test_an_interval_against_a_worked_example() -> None:
    """Differences 1, 2, 3, 4, 5: mean 3, standard error √(2.5 / 5), times 2.7764."""
    theirs = {seed: float(10 * seed) for seed in range(5)}
    found = differences({seed: theirs[seed] + seed + 1 for seed in range(5)} | {9: 0.0}, theirs)
    mean = mean_of(found)
    assert (mean.seeds, mean.value) == (5, pytest.approx(3.0))
    assert mean.standard_error == pytest.approx(math.sqrt(0.5))
    assert mean.half_width == pytest.approx(2.77645 * math.sqrt(0.5), rel=1e-5)
    assert math.isnan(mean_of([1.0]).half_width)
    # Two groups: pooled variance 2, two means of two values each: √(2 (1/2 + 1/2)) / 2.
    both = mean_of([0.0, 2.0], [10.0, 12.0])
    assert (both.value, both.standard_error) == (6.0, pytest.approx(math.sqrt(2.0) / 2))
    assert both.half_width == pytest.approx(t_quantile(0.975, 2) * both.standard_error)


def test_the_best_rate_is_chosen_on_validation() -> None:
    runs = [
        record("LoRA", "search", 5e-3, 1000, 0.8),
        record("LoRA", "search", 1e-2, 1000, 0.8, loss=0.5),
        record("LoRA", "search", 2e-2, 1000, 0.7),
        record("LoRA", "search", 0.123, 1000, 0.9),  # not on the ladder of rates
        record("LoRA", "final", 2e-2, 0, 0.99),
    ]
    assert best_rate(runs, "trec50", "LoRA") == 1e-2
    assert best_rate(runs, "trec50", "SMoA K=2") is None
    assert best_rate(runs, "films", "LoRA") is None
    study = Study(runs)
    assert study.plateau("trec50", "LoRA") == (5e-3, 1e-2)
    assert study.plateau("trec50", "LoRA", points=0.11) == (5e-3, 2e-2)
    assert study.accuracies("trec50", "LoRA") == {}  # the final run had another rate


def test_the_report_says_which_way_it_fell(tmp_path: Path) -> None:
    runs = []
    for method, less in (("LoRA", 0.0), ("SMoA K=2", 0.05), ("random K=2", 0.15)):
        runs += [record(method, "search", lr, 1000, 0.5) for lr in (1e-2, 2e-2)]
        runs += [record(method, "final", 1e-2, seed, 0.8 + seed / 100 - less) for seed in range(3)]
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(run) + "\n" for run in runs))
    names = {written.name for written in generate(path, tmp_path)}
    assert names == {"quality.md", "quality-accuracy.svg", "quality-learning-rate.svg"}
    text = (tmp_path / "quality.md").read_text()
    assert "on 0 of 1 tasks" in text
    assert "; on TREC-50 only 0.01, 0.02)" in text
    assert "-5.0 [-5.0, -5.0] points, below zero" in text
    assert "+10.0 [+10.0, +10.0] points, above zero" in text
    assert "| SMoA K=2, r=8 | 0.50 | 76.0 ± 0.6 | 76.0 |" in text
    assert "## Modules" not in text  # no run of this sweep
    better = [r | {"accuracy": 0.9} if r["method"] == "SMoA K=2" else r for r in runs]
    assert "on 1 of 1 tasks: TREC-50" in page(Study(better))


def test_the_page_says_what_loras_rate_does() -> None:
    ours, twice = "SMoA K=2, r=8, LoRA's rate", "LoRA, 2 times the rate"
    runs = [record("LoRA", "search", lr, 1000, 0.5) for lr in (1e-2, 2e-2)]
    for seed in range(3):
        runs += [record("LoRA", "final", 1e-2, seed, 0.8), record(ours, "final", 1e-2, seed, 0.9)]
        runs += [record(twice, "final", 2e-2, seed, 0.6) | {"worst_loss": 1.0 + seed, "loss_start": 1.0}]
    text = page(Study(runs))
    assert f"| {ours} − LoRA, r=8 | +10.0 [+10.0, +10.0]" in text
    assert f"| {twice} | 3 | 2 | 60.0 |" in text


def test_the_kept_records_are_of_the_study_as_it_is() -> None:
    """A resumed slice finds the records only if they agree."""
    records = store.read(RECORDS)
    assert len(records) == len(RECORDS.read_text().splitlines())
    store.check_one_setting(records)
    assert len(records) == len({str(store.key_of(record)) for record in records})
    for kept in records:
        task, method = vars(TASKS[kept["task"]]), BY_NAME[kept["method"]]
        of_method = dict(vars(method), r=kept["r"] if method.as_large else method.r)
        for names, wanted in ((store.OF_A_TASK, task), (store.OF_A_METHOD, of_method)):
            assert all(kept[name] == wanted[name] for name in names if name not in ("dtype", "data"))


def test_the_results_page_is_what_the_records_say() -> None:
    written = (RECORDS.parent / "quality.md").read_text("utf-8")
    assert written == page(Study(store.read(RECORDS))), "run `python -m benchmarks.quality report`"


def test_at_equal_size_no_k_differs_significantly_from_lora() -> None:
    """The README claims it."""
    study = Study(store.read(RECORDS))
    for ours in EQUALS:
        difference = study.difference(ours, LORA, study.tasks)
        assert difference is not None
        assert difference.low < 0 < difference.high
