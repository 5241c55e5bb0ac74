"""DPOTrainer without a reference model: the reference is a frozen copy of the adapter that training continues from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chat_models import ANSWERS, QUESTIONS, adapter, assert_trains_as, load_base, log_probs, made
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer

BETA = 0.5
PAIRS = [
    {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": ANSWERS[i]}],
        "rejected": [{"role": "assistant", "content": ANSWERS[i - 1]}],
    }
    for i, question in enumerate(QUESTIONS)
]


def preference_loss(reference: nn.Module) -> Any:
    """DPO's loss against a reference model, one sequence at a time."""

    def answers(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        kept = batch["attention_mask"].bool(), batch["completion_mask"].bool()
        rows = zip(batch["input_ids"], *kept, strict=True)
        return torch.stack([log_probs(model, row[mask], own[mask]).sum() for row, mask, own in rows])

    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            expected = answers(reference, batch)
        chosen, rejected = (answers(model, batch) - expected).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    return loss


def test_the_reference_of_a_loaded_adapter_is_a_copy_of_it(base: Path, tmp_path: Path) -> None:
    """Like training that follows supervised training. The copy needs the blocks of the trained adapter."""
    torch.manual_seed(1)
    config = adapter(init_weights=False, block_order="random", smoa_alpha=1.0)
    get_peft_model(load_base(base), config).save_pretrained(tmp_path / "sft")

    def loaded(**settings: Any) -> Any:
        return PeftModel.from_pretrained(load_base(base), tmp_path / "sft", **settings)

    run = made(DPOTrainer, DPOConfig, loaded(is_trainable=True), tmp_path, PAIRS * 4, beta=BETA)
    assert sorted(run.model.peft_config) == ["default", "ref"]
    plain = loaded(is_trainable=True)
    batches, losses = assert_trains_as(plain, run, preference_loss(loaded().eval()), rel=1e-3)
    assert losses[0] == pytest.approx(math.log(2), rel=1e-6)
    tokens = batches[0]["input_ids"]
    run.model.eval().set_adapter("ref")
    assert torch.equal(run.model(tokens).logits, loaded().eval()(tokens).logits)
