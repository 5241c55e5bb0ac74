"""Fine-tune a small mixture-of-experts model with SMoA on its experts, through PEFT and ``transformers.Trainer``.

    python examples/finetune_moe.py    # TREC question classification: progress, accuracy, a saved and a merged model

The model is a tiny Qwen3-MoE with random weights. It shows how to adapt experts, not the accuracy of a trained model.
Reads installed packages and writes its output folder: nothing is downloaded.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported

import re
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import trec
import typer
from options import run_command
from peft import PeftModel, get_peft_model
from questions import Question, split
from training import Score
from transformers import (
    Qwen3MoeConfig,
    Qwen3MoeForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from smoa_kernels.peft import SMoAConfig

CLASSES = sorted(trec.CLASSES.values())
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PADDING, UNKNOWN = 0, 1
LENGTH = 24  # words per question


def finetune(
    output: Annotated[Path, typer.Option(help="Folder for the adapter.")] = Path("runs/finetune-moe"),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 600,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per step.")] = 32,
    eval_questions: Annotated[int, typer.Option(min=1, help="Questions to test.")] = 500,
) -> None:
    """Fine-tune the experts of a tiny Qwen3-MoE with random weights; evaluate, save, load and merge."""
    splits = split(trec.read(trec.locate()))
    words = vocabulary(splits.train)
    set_seed(0)
    base = Qwen3MoeForSequenceClassification(model_config(len(words) + 2))
    frozen = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    blocks = {"r": 8, "num_blocks": 4, "block_order": "contiguous"}
    # PEFT trains and saves the head of this type of task.
    config = SMoAConfig(task_type="SEQ_CLS", target_modules=[], target_parameters=TARGETS, **blocks)
    model = get_peft_model(base, config)
    print("Experts of a tiny Qwen3-MoE with random weights")
    model.print_trainable_parameters()
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=3e-2,
        warmup_steps=steps // 10,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    Trainer(model, arguments, train_dataset=encode(words, splits.train)).train()
    test = encode(words, splits.test[:eval_questions])
    print(f"Accuracy on {len(test)} test questions: {accuracy(model, test)}")
    model.save_pretrained(output / "adapter")
    again = Qwen3MoeForSequenceClassification(base.config)
    again.load_state_dict(frozen)
    loaded = PeftModel.from_pretrained(again, output / "adapter")
    print(f"Saved to {output / 'adapter'}; loaded again: {accuracy(loaded, test)}")
    print(f"Merged into the experts: {accuracy(loaded.merge_and_unload(), test)}")


def model_config(vocab_size: int) -> Qwen3MoeConfig:
    """A Qwen3-MoE of two layers and eight experts each, of which a token takes two."""
    return Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=LENGTH,
        initializer_range=0.1,
        pad_token_id=PADDING,
        num_labels=len(CLASSES),
    )


def vocabulary(questions: Sequence[Question]) -> dict[str, int]:
    """Number the words that occur more than once."""
    counts = Counter(word for question in questions for word in split_words(question))
    return {word: i + 2 for i, word in enumerate(sorted(w for w, n in counts.items() if n > 1))}


def split_words(question: Question) -> list[str]:
    """The question's words and marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]", question.prompt.removesuffix(trec.PROMPT_END).lower())


def encode(words: dict[str, int], questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Padded on the right to `LENGTH` words."""
    encoded = []
    for question in questions:
        ids = [words.get(word, UNKNOWN) for word in split_words(question)[:LENGTH]]
        padding = LENGTH - len(ids)
        mask = [1] * len(ids) + [0] * padding
        label = CLASSES.index(question.answer)
        encoded.append({"input_ids": ids + [PADDING] * padding, "attention_mask": mask, "labels": label})
    return encoded


@torch.no_grad()
def accuracy(model: Any, encoded: Sequence[dict[str, Any]]) -> Score:
    """Classify questions."""
    model.eval()
    right = 0
    for start in range(0, len(encoded), 100):
        rows = encoded[start : start + 100]
        batch = {key: torch.tensor([row[key] for row in rows], device=model.device) for key in rows[0]}
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return Score(right, len(encoded))


main = partial(run_command, finetune)  # bad input is told in one line

if __name__ == "__main__":
    sys.exit(main())
