"""The quality study: its statistics, its verdicts and its page, from made-up records."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

# On the path since benchmarks.quality was imported.
from quality_cases import record

from benchmarks.quality import store
from benchmarks.quality.__main__ import RECORDS
from benchmarks.quality.analysis import Study, over_groups, paired, summarize, t_quantile
from benchmarks.quality.methods import (
    BY_NAME,
)
from benchmarks.quality.report import generate, page
from benchmarks.quality.study import best_rate
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.verdicts import EQUALS, LORA

pytestmark = pytest.mark.slow


def test_t_quantiles_are_those_of_the_tables() -> None:
    for freedom, expected in ((1, 12.7062), (4, 2.7764), (9, 2.2622), (30, 2.0423)):
        assert t_quantile(0.975, freedom) == pytest.approx(expected, abs=5e-5)


def test_paired_interval_against_a_worked_example() -> None:
    """Differences 1, 2, 3, 4, 5: mean 3, standard error √(2.5 / 5), times 2.7764."""
    theirs = {seed: float(10 * seed) for seed in range(5)}
    difference = paired({seed: theirs[seed] + seed + 1 for seed in range(5)} | {9: 0.0}, theirs)
    assert difference is not None
    assert difference.seeds == 5
    assert difference.value == pytest.approx(3.0)
    assert difference.standard_error == pytest.approx(math.sqrt(0.5))
    assert difference.half_width == pytest.approx(2.77645 * math.sqrt(0.5), rel=1e-5)
    assert paired({0: 1.0}, {1: 1.0}) is None
    assert math.isnan(summarize([1.0]).half_width)


def test_mean_over_groups_counts_the_spread_within_them() -> None:
    mean = over_groups([[0.0, 2.0], [10.0, 12.0]])
    assert mean.value == 6.0
    # Pooled variance 2, two means of two values each: √(2 (1/2 + 1/2)) / 2.
    assert mean.standard_error == pytest.approx(math.sqrt(2.0) / 2)
    assert mean.half_width == pytest.approx(t_quantile(0.975, 2) * mean.standard_error)


def test_the_best_rate_is_chosen_on_validation() -> None:
    runs = [
        record("LoRA", "search", 5e-3, 1000, 0.8),
        record("LoRA", "search", 1e-2, 1000, 0.8, loss=0.5),
        record("LoRA", "search", 2e-2, 1000, 0.7),
        record("LoRA", "search", 0.123, 1000, 0.9),  # no rate of the ladder
        record("LoRA", "final", 2e-2, 0, 0.99),
        record("HiRA", "search", 2e-2, 1000, 0.95),
    ]
    assert best_rate(runs, "trec50", "LoRA") == 1e-2
    assert best_rate(runs, "trec50", "SMoA K=2") is None
    assert best_rate(runs, "films", "LoRA") is None
    study = Study(runs)
    assert not study.at_an_edge("trec50", "LoRA")
    assert study.at_an_edge("trec50", "HiRA")
    assert study.plateau("trec50", "LoRA") == (5e-3, 1e-2)
    assert study.plateau("trec50", "LoRA", points=0.11) == (5e-3, 2e-2)
    assert study.accuracies("trec50", "LoRA") == {}  # the run on test had another rate


def test_the_report_says_which_way_it_fell(tmp_path: Path) -> None:
    runs = [
        record(m, "search", lr, 1000, 0.5) for m in ("LoRA", "SMoA K=2", "random K=2") for lr in (1e-2, 2e-2)
    ]
    for seed, accuracy in enumerate((0.80, 0.81, 0.82)):
        runs.append(record("LoRA", "final", 1e-2, seed, accuracy))
        runs.append(record("SMoA K=2", "final", 1e-2, seed, accuracy - 0.05))
        runs.append(record("random K=2", "final", 1e-2, seed, accuracy - 0.15))
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
    better = [r | {"accuracy": 0.9} if r["method"] == "SMoA K=2" else r for r in runs]
    assert "on 1 of 1 tasks: TREC-50" in page(Study(better))


def test_the_kept_records_are_whole() -> None:
    records = store.read(RECORDS)
    assert len(records) == len(RECORDS.read_text().splitlines())
    keys = [store.key_of(record) for record in records]
    assert len(keys) == len(set(map(str, keys)))
    assert {record["method"] for record in records} <= BY_NAME.keys()
    store.check_one_setting(records)
    # They are of the study as it is: a resumed slice finds them.
    for kept in records:
        task, method = TASKS[kept["task"]], BY_NAME[kept["method"]]
        assert [kept[name] for name in ("steps", "batch_size", "layers", "head_lr")] == [
            task.steps, task.batch_size, task.layers, task.head_lr
        ]  # fmt: skip
        key = store.key_of(kept)
        for field in ("num_blocks", "random", "scaling", "modules", "block_order", "granule"):
            assert key[field] == getattr(method, field)
        assert key["r"] == method.r or method.as_large


def test_the_results_page_is_what_the_records_say() -> None:
    written = (RECORDS.parent / "quality.md").read_text("utf-8")
    assert written == page(Study(store.read(RECORDS))), "run `python -m benchmarks.quality report`"


def test_at_equal_size_no_k_differs_significantly_from_lora() -> None:
    """The README says so."""
    study = Study(store.read(RECORDS))
    for ours in EQUALS:
        difference = study.overall(ours, LORA)
        assert difference is not None
        assert difference.low < 0 < difference.high
