"""Ten steps of each of TRL's trainers on SmolLM2-135M, SMoA and PEFT's LoRA in turn.

For benchmarks/results/scripts.md.

    python -m benchmarks.trl_trainers [sft dpo grpo reward]

The two runs of a trainer take turns step by step, so that other work on the machine slows both.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chats
import smollm2
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, PeftConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
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

from smoa_kernels.peft import SMoAConfig

from .machine import cpu_name, load

STEPS = 10
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
LEARNING_RATE = {"SMoA": 1e-2, "LoRA": 1e-3}
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


class Turns(TrainerCallback):  # type: ignore[misc]  # transformers' types are not followed
    """Lets two trainers step in turn, and notes the seconds of each step and what was logged."""

    def __init__(
        self, mine: threading.Semaphore, theirs: threading.Semaphore, both: threading.Barrier
    ) -> None:
        self.mine, self.theirs, self.both = mine, theirs, both
        self.seconds: list[float] = []
        self.logs: list[dict[str, float]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Wait for the other's step to end; both then draw the same random numbers, as GRPO's sampling needs."""
        if not self.seconds:
            self.both.wait()  # else the other draws numbers for its set-up during this one's first step
        self.mine.acquire()
        torch.manual_seed(len(self.seconds))
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Give the turn to the other."""
        self.seconds.append(time.perf_counter() - self.began)
        self.theirs.release()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """Keep what the trainer logs."""
        self.logs.append(logs)


def adapter(method: str, task: str) -> PeftConfig:
    """The configuration of an adapter with r=8, SMoA's with K=2."""
    shared: dict[str, Any] = {"r": 8, "target_modules": TARGETS, "task_type": task}
    return SMoAConfig(num_blocks=2, **shared) if method == "SMoA" else LoraConfig(lora_alpha=8, **shared)


def make(kind: str, method: str, folder: str) -> Any:
    """A trainer of one kind with one adapter."""
    base = smollm2.cached_model()
    task = "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
    torch.manual_seed(0)
    if kind == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32, num_labels=1)
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    # A reward model's head is new, trained in full, and takes the adapter's rate: 1e-2 is too much for it.
    rate = LEARNING_RATE["LoRA" if kind == "reward" else method]
    arguments = {"output_dir": folder, "learning_rate": rate, **SHARED}
    shared = {
        "model": model,
        "processing_class": AutoTokenizer.from_pretrained(base),
        "peft_config": adapter(method, task),
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
    config, trainer = (DPOConfig, DPOTrainer) if kind == "dpo" else (RewardConfig, RewardTrainer)
    return trainer(args=config(per_device_train_batch_size=2, **arguments), train_dataset=pairs, **shared)


def brevity(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    """A reward for few characters."""
    return [-len(completion[0]["content"]) / 10 for completion in completions]


def compare(kind: str) -> str:
    """Run both, step by step in turn; return a row of the table."""
    first, second, both = threading.Semaphore(1), threading.Semaphore(0), threading.Barrier(2)
    turns = {"SMoA": Turns(first, second, both), "LoRA": Turns(second, first, both)}
    threads = []
    with tempfile.TemporaryDirectory() as folder:
        for method, turn in turns.items():
            trainer = make(kind, method, str(Path(folder, method)))
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(turn)
            threads.append(threading.Thread(target=trainer.train))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    measure: Callable[[dict[str, float]], float | None]
    measure = (lambda log: log.get("reward")) if kind == "grpo" else (lambda log: log.get("loss"))
    cells = []
    for turn in turns.values():
        values = [value for log in turn.logs if (value := measure(log)) is not None]
        cells.append(f"{values[0]:.3f} → {values[-1]:.3f}")
    # The first step also allocates what later ones use again.
    pairs = zip(turns["SMoA"].seconds[1:], turns["LoRA"].seconds[1:], strict=True)
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    seconds = (f"{statistics.median(turn.seconds[1:]):.2f}" for turn in turns.values())
    return f"| {kind} | {' | '.join(cells)} | {' | '.join(seconds)} | {ratio:.2f} |"


def main(kinds: list[str]) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    disable_progress_bars()
    print(f"{cpu_name()}, 1 thread, {load():.0f} processes running or waiting")
    print(
        "| trainer | SMoA | LoRA | SMoA, s per step | LoRA, s per step | ratio |\n|---|---|---|---|---|---|"
    )
    for kind in kinds or ["sft", "dpo", "grpo", "reward"]:
        print(compare(kind), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
