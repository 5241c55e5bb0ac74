"""The quality study: the page against the kept records, its statistics, its choice of rates and of questions.

`make quality-smoke` runs a slice from the command line and writes its report.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from questions import same_text

from benchmarks.quality import data, fronts, store
from benchmarks.quality.__main__ import FORGETTING, RECORDS
from benchmarks.quality.analysis import Study, differences, mean_of, t_quantile
from benchmarks.quality.forgetting import LORA as LORA_8
from benchmarks.quality.forgetting import LORA_HALF, RATES, SMOA
from benchmarks.quality.four_bits import INT4, NF4, merge, quantize, quantize_layers
from benchmarks.quality.fronts import Fronts
from benchmarks.quality.methods import BY_NAME, LADDER
from benchmarks.quality.report import EQUALS, LORA, page
from benchmarks.quality.study import best_rate, rate_beyond
from benchmarks.quality.tasks import TASKS

pytestmark = pytest.mark.slow


def test_the_results_page_agrees_with_the_records() -> None:
    written = (RECORDS.parent / "quality.md").read_text("utf-8")
    assert written == page(Study(store.read(RECORDS))), "run `python -m benchmarks.quality report`"
    written = (FORGETTING.parent / "forgetting.md").read_text("utf-8")
    assert written == fronts.page(store.read(FORGETTING)), "run `python -m benchmarks.quality forgetting`"


def test_at_equal_size_no_k_differs_significantly_from_lora() -> None:
    """The README claims it."""
    study = Study(store.read(RECORDS))
    for ours in EQUALS:
        difference = study.difference(ours, LORA, study.tasks)
        assert difference is not None
        assert difference.low < 0 < difference.high


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


def test_an_interval_against_tables_and_a_worked_example() -> None:
    """Differences 1, 2, 3, 4, 5: mean 3, standard error √(2.5 / 5), times 2.7764."""
    for freedom, expected in ((1, 12.7062), (30, 2.0423)):
        assert t_quantile(0.975, freedom) == pytest.approx(expected, abs=5e-5)
    baseline = {seed: float(10 * seed) for seed in range(5)}
    mean = mean_of(differences({seed: baseline[seed] + seed + 1 for seed in range(5)} | {9: 0.0}, baseline))
    assert (mean.seeds, mean.value) == (5, pytest.approx(3.0))
    assert mean.half_width == pytest.approx(2.77645 * math.sqrt(0.5), rel=1e-5)
    # Two groups: pooled variance 2, two means of two values each: √(2 (1/2 + 1/2)) / 2.
    assert mean_of([0.0, 2.0], [10.0, 12.0]).standard_error == pytest.approx(math.sqrt(2.0) / 2)


def test_the_best_rate_is_chosen_on_validation() -> None:
    def record(stage: str, lr: float, accuracy: float, loss: float = 1.0) -> dict[str, Any]:
        found = {"task": "trec50", "method": "LoRA", "stage": stage, "lr": lr, "seed": 0}
        return found | {"accuracy": accuracy, "evaluation_loss": loss}

    runs = [
        record("search", 5e-3, 0.8),
        record("search", 1e-2, 0.8, loss=0.5),
        record("search", 2e-2, 0.7),
        record("search", 0.123, 0.9),  # not on the ladder of rates
        record("final", 2e-2, 0.99),
    ]
    assert best_rate(runs, "trec50", "LoRA") == 1e-2
    assert best_rate(runs, "films", "LoRA") is None
    assert Study(runs).plateau("trec50", "LoRA") == (5e-3, 1e-2)
    assert Study(runs).accuracies("trec50", "LoRA") == {}  # the final run had another rate
    # A search goes on while the best rate is at an end.
    assert rate_beyond([5e-3, 1e-2, 2e-2], 1e-2) is None
    assert rate_beyond([5e-3, 1e-2, 2e-2], 5e-3) == 2e-3
    assert rate_beyond(LADDER, LADDER[-1]) is None


def test_shares_at_equal_accuracy_on_planted_fronts() -> None:
    """Nats are `c·e^(20·accuracy)`, so a share is that of the constants, its interval that of their logarithms."""
    noise = {SMOA: (-0.1, 0.2, 0.0), LORA_8: (0.0, 0.1, -0.3), LORA_HALF: (0.0, 0.0, 0.0)}
    constant, rates = {SMOA: 0.4, LORA_8: 1.0, LORA_HALF: 0.5}, RATES["trec6-whole"]

    def run(method: Any, lr: float, seed: int, better: float = 0.0) -> dict[str, Any]:
        accuracy = 0.8 + 10 * lr + 0.01 * seed + better
        nats = constant[method] * math.exp(noise[method][seed] + 20 * (accuracy - 0.01 * seed))
        sizes = {"peak": [nats**0.5], "delta": [nats**0.5 * (4 if method is SMOA else 1)]}
        given = {"method": method.name, "lr": lr, "seed": seed}
        return given | {"accuracy": accuracy, "nats_more": nats, **sizes}

    runs = [run(m, lr, seed) for m in constant for lr in rates[m] for seed in range(3)]
    found = Fronts([*runs, run(SMOA, 2e-3, 0) | {"seed": 9}])  # a seed without its other runs does not count
    expected = mean_of([math.log(0.4) + a - b for a, b in zip(noise[SMOA], noise[LORA_8], strict=True)])
    assert found.target({0, 1, 2}) == pytest.approx(0.85)
    assert found.share(SMOA.name, LORA_8.name) == pytest.approx(expected)
    assert found.error("peak") == pytest.approx(1.0)
    assert found.error("delta") > 1.5  # one curve for SMoA, another for LoRA
    # Both have the same seeds, so what a seed does to both cancels.
    assert found.share(LORA_HALF.name, LORA_HALF.name) == pytest.approx((0.0, 0.0, 0.0, 3))
    # A front that is nowhere, or everywhere, as accurate has no share.
    for better in (-0.1, 0.1):
        far = [run(SMOA, lr, seed, better) for lr in rates[SMOA] for seed in range(3)]
        assert Fronts([*runs, *far]).share(SMOA.name, LORA_8.name) is None
    assert Fronts(runs[:1]).share(SMOA.name, LORA_8.name) is None


@pytest.mark.parametrize("name", ["trec50", "films", "opinions"])
def test_splits_are_disjoint(name: str) -> None:
    splits = data.prepare(TASKS[name].read(), TASKS[name].held_out)
    prompts = [{same_text(question.prompt) for question in part} for part in splits]
    assert all(map(len, prompts))
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    assert {q.answer for q in splits.test} <= {q.answer for q in splits.train}


def test_nf4_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="not installed")
    weight = torch.randn(32, 128)
    expected = functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    assert torch.equal(quantize(weight, NF4).dequantize(), expected)


@pytest.mark.parametrize("name", ["SMoA K=2 over int4", "scales over int4", "LoRA over int4"])
def test_merging_into_four_bits(name: str) -> None:
    """What multiplies scales loses their rounding alone; what is added loses a part."""
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(128, 64)), torch.randn(16, 128)
    layers = quantize_layers(model, "0", INT4)
    (layer, old), method = *layers.items(), BY_NAME[name]
    adapted = method.adapt(model, {"target_modules": "0"}, seed=0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn_like(parameter)
        y0, y = torch.nn.functional.linear(x, old.dequantize(), layer.bias), adapted(x)
        merge(adapted, layers, INT4)
        lost = float((adapted(x) - y).norm() / (y - y0).norm())
    assert lost > 0.2 if method.kind == "lora" else lost < 0.05
