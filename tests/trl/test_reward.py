"""RewardTrainer: a head of one output, either trained in full beside the adapters or adapted itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chat_models import (
    ANSWERS,
    QUESTIONS,
    TARGETS,
    adapter,
    assert_trains_as,
    chat,
    made,
    trained,
    twin,
)
from peft import AutoPeftModelForSequenceClassification
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

PAIRS = [
    {"chosen": chat(question, ANSWERS[i]), "rejected": chat(question, ANSWERS[i - 1])}
    for i, question in enumerate(QUESTIONS)
]
WAYS = {
    "the head is trained in full": {"target_modules": TARGETS},
    "all linear layers but the head": {"target_modules": "all-linear"},
    "the head has one block": {
        "target_modules": [*TARGETS, "score"],
        "modules_to_save": None,
        "num_blocks_pattern": {"score": 1},
    },
}


def load_base(folder: Path) -> Any:
    torch.manual_seed(2)  # for the new head
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, num_labels=1)


def trainer(base: Path, folder: Path, **settings: Any) -> Any:
    config = adapter(**{"task_type": "SEQ_CLS", **settings})
    return made(RewardTrainer, RewardConfig, load_base(base), folder, PAIRS * 4, peft_config=config)


def preference_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The Bradley-Terry loss, one chat at a time."""
    rows = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    rewards = torch.cat([model(input_ids=row[mask][None]).logits[:, 0] for row, mask in rows])
    chosen, rejected = rewards.chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


@pytest.mark.parametrize("way", WAYS)
def test_losses_are_those_of_plain_torch_and_a_saved_model_loads(
    base: Path, tmp_path: Path, way: str
) -> None:
    settings = dict(WAYS[way])
    if "modules_to_save" in settings:  # for SEQ_CLS PEFT adds the head to these
        settings["task_type"] = None
    run = trainer(base, tmp_path, **settings)
    assert any("score" in name for name in trained(run.model))
    plain = twin(run, load_base(base), adapter(**{"task_type": "SEQ_CLS", **settings}))
    batches, losses = assert_trains_as(plain, run, preference_loss, rel=1e-3)
    assert losses[-1] < losses[0]
    if settings.get("task_type", "SEQ_CLS") is None:
        return
    run.save_model(str(tmp_path / "adapter"))
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=1).eval()
    tokens = batches[0]["input_ids"]
    mask = batches[0]["attention_mask"]
    assert torch.equal(
        loaded(tokens, attention_mask=mask).logits, run.model.eval()(tokens, attention_mask=mask).logits
    )


def test_a_head_smaller_than_k_is_refused_with_the_ways_out(base: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"score: num_blocks must be at most .* = 1 .*got 2; num_blocks_pattern .*exclude_modules",
    ):
        trainer(base, tmp_path, task_type=None, target_modules=[*TARGETS, "score"])
