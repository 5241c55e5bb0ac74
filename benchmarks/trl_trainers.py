"""Ten steps of each of TRL's trainers on SmolLM2-135M, SMoA and PEFT's LoRA in turn.

For benchmarks/results/scripts.md.

    python -m benchmarks.trl_trainers [sft dpo grpo reward]

The two take turns, so that other work on the machine slows both.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from typing import Any

import chats
import smollm2
import torch
from datasets import Dataset, disable_progress_bars
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from .machine import cpu_name, load
from .models import adapter_configs
from .protocol import Turns, laps
from .providers import LORA, SMOA
from .tables import shown, table

STEPS, ROUNDS = 10, 3
LEARNING_RATE = {SMOA: 1e-2, LORA: 1e-3}
WHAT = {"sft": "loss", "dpo": "loss", "grpo": "reward", "reward": "loss"}
"""What each kind of trainer shows."""
SHARED: dict[str, Any] = {
    "max_steps": STEPS,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}


def make(kind: str, method: str, folder: str) -> Any:
    """A trainer of one kind with one adapter."""
    base = smollm2.cached_model()
    config = adapter_configs(num_blocks=2)[method]
    config.task_type = "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
    torch.manual_seed(0)
    if kind == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32, num_labels=1)
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    # A reward model's head is new, trained in full, and takes the adapter's rate: 1e-2 is too much for it.
    rate = LEARNING_RATE[LORA if kind == "reward" else method]
    arguments = {"output_dir": folder, "learning_rate": rate, **SHARED}
    shared = {
        "model": model,
        "processing_class": AutoTokenizer.from_pretrained(base),
        "peft_config": config,
    }
    turns = chats.turns(chats.read_corpus(chats.locate()))[:200]
    answers = [turn["completion"] for turn in turns]
    if kind == "sft":
        args = SFTConfig(per_device_train_batch_size=1, packing=True, max_length=192, **arguments)
        return SFTTrainer(args=args, train_dataset=Dataset.from_list(turns), **shared)
    if kind == "grpo":
        args = GRPOConfig(
            per_device_train_batch_size=4, num_generations=4, max_completion_length=16, beta=0.04, **arguments
        )
        prompts = Dataset.from_list([{"prompt": turn["prompt"]} for turn in turns])
        return GRPOTrainer(args=args, train_dataset=prompts, reward_funcs=brevity, **shared)
    pairs = Dataset.from_list(
        [
            {"prompt": turn["prompt"], "chosen": answers[i], "rejected": answers[i - 1]}
            for i, turn in enumerate(turns)
        ]
    )
    settings, trainer = (DPOConfig, DPOTrainer) if kind == "dpo" else (RewardConfig, RewardTrainer)
    return trainer(args=settings(per_device_train_batch_size=2, **arguments), train_dataset=pairs, **shared)


def brevity(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    """A reward for few characters."""
    return [-len(completion[0]["content"]) / 10 for completion in completions]


def compare(kind: str) -> list[str]:
    """Train with both in turns; a row of the table."""
    logs: dict[str, list[dict[str, float]]] = {}

    def run(method: str) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            trainer = make(kind, method, folder)
            trainer.remove_callback(PrinterCallback)
            (seconds,) = laps(trainer.train)
        logs[method] = trainer.state.log_history
        return {"step": seconds / STEPS}

    turns = Turns({method: partial(run, method) for method in LEARNING_RATE}, LORA)
    for _ in range(ROUNDS):
        turns.round()
    found, cells = turns.comparisons()["step"], []
    for method in LEARNING_RATE:
        values = [log[WHAT[kind]] for log in logs[method] if WHAT[kind] in log]
        cells.append(f"{values[0]:.3f} → {values[-1]:.3f}")
    figures = (*map(found.time, LEARNING_RATE), found.ratio(SMOA))
    return [kind, *cells, *map(shown, figures)]


def main(kinds: list[str]) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    disable_progress_bars()
    print(f"{cpu_name()}, 1 thread, {load():.0f} processes running or waiting")
    headings = ("trainer", *LEARNING_RATE, *(f"{method}, s per step" for method in LEARNING_RATE), "ratio")
    print(table(headings, [compare(kind) for kind in kinds or WHAT]))


if __name__ == "__main__":
    main(sys.argv[1:])
