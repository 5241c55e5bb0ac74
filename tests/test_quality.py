"""The quality study: its statistics, its cut models, runs that are not repeated, and the page against the kept records.

`make quality-smoke` runs a slice from the command line and writes its report.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import minilm
import pytest
import smollm2
import torch
from questions import Encoder, Question, same_text
from torch import nn
from training import next_token_scores

from benchmarks.quality import data, store
from benchmarks.quality.__main__ import RECORDS
from benchmarks.quality.analysis import Study, differences, mean_of, t_quantile
from benchmarks.quality.data import Choice
from benchmarks.quality.methods import BY_NAME, LADDER, shuffled
from benchmarks.quality.models import (
    ChoiceModel,
    ChoiceUpper,
    answer_tokens,
    cut_minilm,
    cut_smollm2,
    rows_of,
    vocabulary,
)
from benchmarks.quality.report import EQUALS, LORA, page
from benchmarks.quality.study import best_rate, rate_beyond
from benchmarks.quality.tasks import TASKS
from smoa_kernels import BlockPartition

pytestmark = pytest.mark.slow

# Published figures


def test_the_results_page_agrees_with_the_records() -> None:
    written = (RECORDS.parent / "quality.md").read_text("utf-8")
    assert written == page(Study(store.read(RECORDS))), "run `python -m benchmarks.quality report`"


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


@pytest.mark.parametrize(
    ("change", "message"),
    [({"head_lr": 0.5}, r"have head_lr .* and 0\.5"), ({"num_blocks": 99}, "have num_blocks .* and 99")],
    ids=["of a task", "of a method"],
)
def test_two_settings_are_refused(change: dict[str, Any], message: str) -> None:
    record = store.read(RECORDS)[0]
    with pytest.raises(ValueError, match=f"{message}: a report is of one setting"):
        store.check_one_setting([record, record, record | change])


def test_stored_runs_outlive_a_crash_and_are_known_again(tmp_path: Path) -> None:
    path, kept = tmp_path / "runs.jsonl", store.read(RECORDS)[:2]
    assert store.read(path) == []
    store.append(path, kept[0])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"task": "trec50", "meth')  # a crash leaves half a line
    assert store.read(path) == kept[:1]
    store.append(path, kept[1])
    again = store.read(path)
    assert again == kept
    assert [store.key_of(record) for record in again] == [store.key_of(record) for record in kept]
    assert store.key_of(kept[0]) != store.key_of(kept[1])


def test_an_interval_against_tables_and_a_worked_example() -> None:
    """Differences 1, 2, 3, 4, 5: mean 3, standard error √(2.5 / 5), times 2.7764."""
    for freedom, expected in ((1, 12.7062), (30, 2.0423)):
        assert t_quantile(0.975, freedom) == pytest.approx(expected, abs=5e-5)
    theirs = {seed: float(10 * seed) for seed in range(5)}
    mean = mean_of(differences({seed: theirs[seed] + seed + 1 for seed in range(5)} | {9: 0.0}, theirs))
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


# Questions and models


@pytest.mark.parametrize("name", ["trec50", "films", "opinions"])
def test_splits_are_disjoint(name: str) -> None:
    splits = data.prepare(TASKS[name].read(), TASKS[name].held_out)
    prompts = [{same_text(question.prompt) for question in part} for part in splits]
    assert all(map(len, prompts))
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    assert {q.answer for q in splits.test} <= {q.answer for q in splits.train}


@pytest.mark.parametrize("cut", [cut_minilm, cut_smollm2])
def test_a_cut_model_scores_like_the_whole_one(cut: Any) -> None:
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    ours = cut(["blue", "green", "white"], 2)
    questions = [Question("What colour is grass?", "green"), Question("And snow, on a clear day?", "white")]
    batch = ours.batch(questions)
    folder = minilm.locate() if cut is cut_minilm else smollm2.cached_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        scores = ours.upper(batch.hidden, batch.layout)
        if cut is cut_minilm:
            rows = tokenizer([q.prompt for q in questions], return_tensors="pt", padding=True)
            states = AutoModel.from_pretrained(folder, dtype=torch.float32)(**rows).last_hidden_state
            mask = rows["attention_mask"][..., None]
            expected = ours.upper.head((states * mask).sum(1) / mask.sum(1))
        else:
            encoder = Encoder(tokenizer, set(ours.classes), 100)
            whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            asked = encoder.batch(questions)
            expected = next_token_scores(whole, asked.input_ids, asked.attention_mask)
            expected = expected[:, encoder.answer_tokens]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    assert [ours.classes[i] for i in batch.labels] == ["green", "white"]


def letters(texts: Any, **_: Any) -> Any:
    """A tokenizer of one text or several, with one token per letter."""
    ids = [ord(c) for c in texts] if isinstance(texts, str) else [[ord(c) for c in text] for text in texts]
    return type("Encoding", (), {"input_ids": ids})


def test_answers_in_one_row_score_as_they_do_alone() -> None:
    from tiny_models import tiny_llama

    whole = tiny_llama(vocab_size=128).model
    lower, body = copy.deepcopy(whole), copy.deepcopy(whole)
    lower.layers, lower.norm = lower.layers[:1], nn.Identity()  # type: ignore[assignment]
    lower.config.num_hidden_layers = 1
    body.layers, body.embed_tokens = body.layers[1:], nn.Identity()  # type: ignore[assignment]
    questions = [
        Choice("Where is it?", "at sea", ("home", "at sea", "up")),
        Choice("Why not?", "so it is", ("a cat", "so it is")),
    ]
    classes = sorted({answer for question in questions for answer in question.choices})
    tokenizer: Any = letters
    tokens = vocabulary(answer_tokens(tokenizer, classes))
    upper = ChoiceUpper(body, rows_of(whole.embed_tokens.weight, tokens), causal=True)
    batch = ChoiceModel(lower, upper, tokenizer, classes, {}).batch(questions)
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


def test_random_blocks_keep_their_sizes() -> None:
    spectral = BlockPartition.from_weight(torch.randn(37, 20), 3)
    random, again, other = (shuffled(spectral, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert random == again
    assert random not in (spectral, other)
    assert (random.row_sizes, random.col_sizes) == (spectral.row_sizes, spectral.col_sizes)
