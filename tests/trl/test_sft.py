"""SFTTrainer: packed, padding-free, padded, and answers only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_models import (
    ANSWERS,
    PLAIN,
    QUESTIONS,
    adapter,
    assert_trains_as,
    chat,
    load_base,
    log_probs,
    made,
    tokenizer,
    trained,
    twin,
)
from datasets import Dataset
from torch import Tensor, nn
from trl import SFTConfig, SFTTrainer

CHATS = [
    chat(q, a, ANSWERS[i - 1]) if i % 2 else chat(q, a)
    for i, (q, a) in enumerate(zip(QUESTIONS, ANSWERS, strict=True))
]
ROWS = [{"messages": messages} for messages in CHATS]
BATCHES: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"packing": True, "max_length": 160},
    "padding-free": {"padding_free": True, "max_length": None},
}


def sequences(batch: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """The chats in a batch with their labels, however they were packed or padded."""
    tokens, labels = batch["input_ids"], batch["labels"]
    if "position_ids" not in batch:
        kept = [mask.bool() for mask in batch["attention_mask"]]
        return [(row[mask], own[mask]) for row, own, mask in zip(tokens, labels, kept, strict=True)]
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    sizes = [end - start for start, end in zip(starts, [*starts[1:], tokens.shape[1]], strict=True)]
    return list(zip(tokens[0].split(sizes), labels[0].split(sizes), strict=True))


def answer_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The mean loss over the tokens of answers; each chat runs alone."""
    each = [-log_probs(model, tokens, labels != -100) for tokens, labels in sequences(batch)]
    return torch.cat(each).mean()


@pytest.mark.parametrize("way", BATCHES)
def test_losses_are_those_of_plain_torch_on_one_chat_at_a_time(base: Path, tmp_path: Path, way: str) -> None:
    settings = {"assistant_only_loss": True, "peft_config": adapter(), **BATCHES[way]}
    model, plain = (load_base(base) for _ in range(2))
    run = made(SFTTrainer, SFTConfig, model, tmp_path, ROWS * 4, **settings)
    plain = twin(run, plain, adapter())
    batches, _ = assert_trains_as(plain, run, answer_loss, rel=1e-4)
    if way == "packed":
        assert max(len(sequences(batch)) for batch in batches) > PLAIN["per_device_train_batch_size"]
    for name, parameter in trained(run.model).items():
        torch.testing.assert_close(parameter, plain.get_parameter(name), rtol=1e-2, atol=1e-4)
    answers = {f"{answer}<|im_end|>" for answer in ANSWERS}
    for tokens, labels in (pair for batch in batches for pair in sequences(batch)):
        text = tokenizer().decode(tokens[labels != -100])
        assert text.count("<|im_end|>") == tokenizer().decode(tokens).count("assistant")
        assert {f"{part}<|im_end|>" for part in text.split("<|im_end|>")[:-1]} <= answers


def test_the_pages_example_runs(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "trl.md"
    code, sends = re.findall(
        r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    dataset = Dataset.from_list(ROWS)
    exec(compile(code, "example", "exec"), {"model": load_base(base), "dataset": dataset})
    assert Path("runs/chat/adapter/adapter_model.safetensors").is_file()
    defined: dict[str, Any] = {"__name__": "example"}
    exec(compile(sends, "example", "exec"), defined)
    assert issubclass(defined["Trainer"], defined["AsyncGRPOTrainer"])
