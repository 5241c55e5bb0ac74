"""transformers' Trainer as its users call it: trains, saves, resumes, continues; `test_trainer.py` launches it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from smoa_kernels.peft import SMoAConfig

STEPS, KEPT = 4, 2  # steps of a run, and those before its checkpoint
TOKENS = torch.arange(12).view(2, 6)


def trainer(model: torch.nn.Module, arguments: TrainingArguments) -> Trainer:
    rows = torch.randint(64, (24, 6), generator=torch.Generator().manual_seed(2))
    samples = [{"input_ids": row, "labels": row} for row in rows]
    return Trainer(model=model, args=arguments, train_dataset=samples)


def run(folder: Path, processes: int = 1, deepspeed: str | None = None) -> dict[str, Any]:
    """Losses of a run, of one resumed from its checkpoint and of one that goes on with what it saved; its logits.

    `folder`/base holds the base model. A batch has four samples, whatever the number of processes.
    """

    def arguments() -> TrainingArguments:
        AcceleratorState._reset_state()
        return TrainingArguments(
            str(folder / "runs"),
            per_device_train_batch_size=4 // processes,
            max_steps=STEPS,
            learning_rate=3e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_steps=KEPT,
            report_to=[],
            disable_tqdm=True,
            use_cpu=processes == 1,
            deepspeed=deepspeed,
        )

    def losses(run: Trainer) -> list[float]:
        return [entry["loss"] for entry in run.state.log_history if "loss" in entry]

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder / "base")

    def adapted() -> Any:
        torch.manual_seed(0)
        return get_peft_model(base(), SMoAConfig(r=4, target_modules="all-linear", use_lora_rate=True))

    given = arguments()  # before the model, which ZeRO-3 partitions as it loads
    first = trainer(adapted(), given)
    first.train()
    first.save_model(str(folder / "adapter"))
    first.model.eval()
    with torch.no_grad():
        logits = first.model_wrapped(TOKENS).logits
    given = arguments()
    resumed = trainer(adapted(), given)
    resumed.train(resume_from_checkpoint=str(folder / "runs" / f"checkpoint-{KEPT}"))
    given = arguments()
    after = trainer(PeftModel.from_pretrained(base(), folder / "adapter", is_trainable=True), given)
    after.train()
    kind = str(first.accelerator.distributed_type)
    runs = {"first": losses(first), "resumed": losses(resumed)[KEPT:], "after": losses(after)}
    return {"kind": kind, "logits": logits, "runs": runs}


if __name__ == "__main__":
    # accelerate shards nothing on CPUs; told that this is a GPU, it runs the code of one.
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    given = ("gloo", DistributedType.MULTI_GPU)
    with patch.object(PartialState, "_prepare_backend", lambda *_: given):
        results = run(Path(sys.argv[1]), 2, *sys.argv[2:])
    if PartialState().is_main_process:
        torch.save(results, Path(sys.argv[1]) / "results.pt")
    torch.distributed.barrier()
    # DeepSpeed keeps its process groups until Python ends, and a thread of gloo's that asks for the interpreter then
    # aborts the process ("terminate called without an active exception", seen once).
    os._exit(0)
