"""The quality study: its questions, and real models cut to their upper layers."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import minilm
import pytest
import smollm2
import torch
from quality_cases import COLOURS
from questions import Encoder, Question, Splits, same_text
from torch import nn
from training import next_token_scores

from benchmarks.quality import data
from benchmarks.quality.data import Choice
from benchmarks.quality.models import (
    ChoiceModel,
    ChoiceUpper,
    answer_tokens,
    cut_minilm,
    cut_smollm2,
    rows_of,
    vocabulary,
)
from benchmarks.quality.tasks import TASKS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["trec50", "films", "opinions", "trec6"])
def test_splits_are_disjoint(name: str) -> None:
    splits = data.prepare(TASKS[name].read(), TASKS[name].held_out)
    prompts = [{same_text(question.prompt) for question in part} for part in splits]
    assert all(map(len, prompts))
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    assert len(splits.train) <= data.TRAINING_QUESTIONS
    assert {q.answer for q in splits.test} <= {q.answer for q in splits.train}
    assert data.digest(splits) != data.digest(splits._replace(test=splits.test[1:]))


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
    tokenizer: Any = spelled
    tokens = vocabulary(answer_tokens(tokenizer, classes))
    upper = ChoiceUpper(body, rows_of(whole.embed_tokens.weight, tokens), causal=True)
    cut = ChoiceModel(lower, upper, tokenizer, classes, {})
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


def test_commonsense_questions_are_read_once_with_all_of_their_answers(tmp_path: Path) -> None:
    def doc(query: str, choices: list[str], gold: int) -> dict[str, Any]:
        return {"doc": {"query": query, "choices": choices, "gold": gold}}

    rows = [doc("Where?\nAnswer:", ["here", " there"], 1)] * 2 + [doc("Who?\nAnswer:", ["he", "he"], 0)]
    with gzip.open(tmp_path / "requests.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    found = data.read_choices(tmp_path / "requests.jsonl.gz")
    assert found == [Choice("Where?\nAnswer:", "there", ("here", "there"))]
    offered = Splits(found, COLOURS[:1], [])
    assert data.answers(offered) == ["green", "here", "there"]
    assert data.digest(offered) != data.digest(offered._replace(train=[Question("Where?\nAnswer:", "there")]))


def spelled(texts: Any, **_: Any) -> Any:
    """A tokenizer of one text or several, with one token per letter."""
    one = isinstance(texts, str)
    return type(
        "Encoding",
        (),
        {"input_ids": [ord(c) for c in texts] if one else [[ord(c) for c in t] for t in texts]},
    )
