"""Fine-tune a chat model with TRL's ``SFTTrainer`` and SMoA: chats in, adapter out.

    python examples/sft.py                                  # SmolLM2-135M learns to answer briefly
    python examples/sft.py --model DIR --data chats.jsonl   # your model; {"messages": [...]} per line
    python examples/sft.py --resume                         # go on from the last checkpoint

Needs no network once its packages are installed.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # idle threads sleep early, for other programs run too

import random
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import chats
import smollm2
import torch
import typer
from datasets import Dataset, disable_progress_bars
from options import checkpoint_of, run_command
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from smoa_kernels.peft import SMoAConfig

HELD_OUT = 50  # answers to judge the adapter by


def sft(
    model: Annotated[Path | None, typer.Option(help="Folder. Default: SmolLM2-135M-Instruct.")] = None,
    data: Annotated[
        Path | None, typer.Option(help='JSONL, {"messages": [...]} per line. Default: chatterbot-corpus.')
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for checkpoints and the adapter.")] = Path("runs/sft"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in it.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 60,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens per step, filled with chats.")] = 384,
    lr: Annotated[float, typer.Option(min=0, help="Peak learning rate, that of a LoRA run.")] = 1e-3,
    r: Annotated[int, typer.Option(min=1, help="Rank budget of the adapter.")] = 16,
    num_blocks: Annotated[int, typer.Option(min=1, help="SMoA's blocks.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
) -> None:
    """Fine-tune a chat model with TRL's SFTTrainer and SMoA: chats in, adapter out."""
    disable_progress_bars()
    found = chats.read_corpus(chats.locate()) if data is None else chats.read_jsonl(data)
    base = smollm2.cached_model() if model is None else model.resolve(strict=True)
    checkpoint = checkpoint_of(output, resume)
    tokenizer = AutoTokenizer.from_pretrained(base)
    random.Random(seed).shuffle(found)
    answers = chats.turns(found)
    if len(answers) < 2 * HELD_OUT:
        raise ValueError(f"--data: {len(answers)} answers are too few, at least {2 * HELD_OUT} are needed")
    held_out, train = answers[:HELD_OUT], answers[HELD_OUT:]

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(output),
            max_steps=steps,
            per_device_train_batch_size=1,  # of `max_length` tokens
            packing=True,
            eval_packing=False,
            max_length=max_length,
            learning_rate=lr,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 10,
            gradient_checkpointing=False,  # faster, where memory allows it
            logging_steps=10,
            save_steps=20,
            save_total_limit=2,
            report_to="none",
            bf16=torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=seed,
        ),
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(held_out),
        processing_class=tokenizer,
        peft_config=SMoAConfig(
            task_type="CAUSAL_LM",
            r=r,
            num_blocks=num_blocks,
            use_lora_rate=True,
            target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
        ),
    )
    print(f"{len(train)} answers to train on, {HELD_OUT} held out")
    trainer.model.print_trainable_parameters()
    judge(trainer, tokenizer, held_out)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(output / "adapter"))  # the adapter, its configuration and the tokenizer
    judge(trainer, tokenizer, held_out)
    print(f"Adapter saved in {output / 'adapter'}: AutoPeftModelForCausalLM.from_pretrained loads it")


def judge(trainer: SFTTrainer, tokenizer: PreTrainedTokenizerBase, held_out: list[dict[str, Any]]) -> None:
    """Print the loss on the held-out chats, and the model's answers to three of their questions."""
    print(f"Loss on held-out answers: {trainer.evaluate()['eval_loss']:.3f}")
    for sample in held_out[:3]:
        said = answer(trainer.model, tokenizer, sample["prompt"])
        print(f"  {sample['prompt'][-1]['content']}  {said}")


def answer(model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: chats.Chat) -> str:
    """Return the likeliest answer. It merges the weights, which is faster, and unmerging restores every bit."""
    tokens = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model.eval()
    model.merge_adapter()
    try:
        output = model.generate(**tokens.to(model.device), max_new_tokens=40, do_sample=False)
    finally:
        model.unmerge_adapter()
    text: str = tokenizer.decode(output[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())


main = partial(run_command, sft)  # bad input is told in one line

if __name__ == "__main__":
    sys.exit(main())
