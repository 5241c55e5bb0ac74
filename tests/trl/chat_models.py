"""Helpers of the tests with TRL's trainers: a tiny chat model on disk, chats, and records of each training step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import get_peft_model
from tiny_models import STEPS_ALONE, tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from smoa_kernels.peft import SMoAConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUESTIONS = ("how far is it?", "who wrote that", "is rain wet, and why?")
QUESTIONS = (*QUESTIONS, "one more", "which way", "and then?")
ANSWERS = ("two miles.", "nobody knows", "yes: water is", "no", "left, then right", "home")
# The plainest settings, so that a simple loop can compute each step's loss.
PLAIN: dict[str, Any] = {
    **STEPS_ALONE,
    **{"max_steps": 4, "per_device_train_batch_size": 3, "learning_rate": 1e-2},
    **{"use_cpu": True, "bf16": False},
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, plus the special tokens of chats."""
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {
        token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )


def save_base(folder: Path) -> Path:
    """A folder with a chat model of random weights and its tokenizer."""
    words = tokenizer()
    special = {"pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id, "bos_token_id": None}
    model = tiny_llama(vocab_size=len(words), initializer_range=0.1, **special)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def load_base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def adapter(**settings: Any) -> SMoAConfig:
    return SMoAConfig(
        **{"r": 4, "num_blocks": 2, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings}
    )


def made(
    kind: Any, config: Any, model: nn.Module, folder: Path, rows: list[dict[str, Any]], **settings: Any
) -> Any:
    """One of TRL's trainers. `settings` are its own where it takes them, else its configuration's."""
    own = {name: settings.pop(name) for name in ("peft_config", "reward_funcs") if name in settings}
    return kind(
        model=model,
        args=config(output_dir=str(folder), **{**PLAIN, **settings}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        **own,
    )


def chat(question: str, *answers: str) -> list[dict[str, str]]:
    """A chat that repeats the question before each answer."""
    turns = [[{"role": "user", "content": question}, {"role": "assistant", "content": a}] for a in answers]
    return [message for turn in turns for message in turn]


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the frozen parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def assert_base_is(model: nn.Module, before: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    assert before
    assert all(torch.equal(parameters[name], value) for name, value in before.items())


def twin(trainer: Any, model: nn.Module, config: SMoAConfig) -> nn.Module:
    """A model with a trainer's current weights, without TRL's changes to a model's forward."""
    made = get_peft_model(model, config)
    made.load_state_dict(trainer.model.state_dict())
    return made


def plain_loop(model: nn.Module, batches: list[dict[str, Any]], loss_of: Any) -> list[float]:
    """The losses of a plain torch loop on a trainer's batches, with the trainer's documented optimizer."""
    model.train()
    parameters = list(trained(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=PLAIN["learning_rate"], weight_decay=0.0)
    losses = []
    for batch in batches:
        loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_trains_as(
    plain: nn.Module, trainer: Any, loss_of: Any, rel: float
) -> tuple[list[dict[str, Any]], list[float]]:
    """Train; each loss is that of the plain loop, and the base is unchanged. Returns each step's inputs and loss."""
    batches: list[dict[str, Any]] = []
    losses: list[float] = []
    before, inner = base_state(trainer.model), trainer.compute_loss

    def compute_loss(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        batches.append({key: copy.copy(value) for key, value in inputs.items()})
        loss = inner(model, inputs, *args, **kwargs)
        losses.append(loss.item())
        return loss

    trainer.compute_loss = compute_loss
    trainer.train()
    assert_base_is(trainer.model, before)
    assert losses == pytest.approx(plain_loop(plain, batches, loss_of), rel=rel)
    return batches, losses


def log_probs(model: nn.Module, tokens: Tensor, kept: Tensor) -> Tensor:
    """The log-probabilities of the kept tokens of one sequence, computed alone: no padding, no packing."""
    logits = model(input_ids=tokens[None]).logits[0, :-1]
    each = F.log_softmax(logits.float(), -1).gather(1, tokens[1:, None])[:, 0]
    return each[kept[1:]]
