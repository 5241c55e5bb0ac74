"""Fine-tune a classifier on all-MiniLM-L6-v2 with ``transformers.Trainer`` and SMoA through PEFT.

    python examples/classify.py             # TREC question classification: progress, accuracy, a saved adapter
    python examples/classify.py --resume    # go on from the last checkpoint of a run that was stopped

Reads installed packages and writes its output folder: nothing is downloaded, nothing is pushed anywhere.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import minilm
import torch
import trec
import typer
from options import checkpoint_of, run_command
from peft import TaskType, get_peft_model
from questions import Question, split
from training import Score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from smoa_kernels.peft import SMoAConfig

# On the validation questions after 150 steps: 5e-3 88.8 %, 1e-2 90.8, 3e-2 92.0.
LEARNING_RATE = 3e-2
CLASSES = sorted(trec.CLASSES.values())


def classify(
    output: Annotated[Path, typer.Option(help="Folder for checkpoints and adapter.")] = Path("runs/classify"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in it.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 200,
    save_every: Annotated[int, typer.Option(min=1, help="Steps from one checkpoint to the next.")] = 50,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per step.")] = 32,
    lr: Annotated[float, typer.Option(min=0, help="Peak learning rate.")] = LEARNING_RATE,
    r: Annotated[int, typer.Option(min=1, help="Rank budget of the adapter.")] = 16,
    num_blocks: Annotated[int, typer.Option(min=1, help="Spectral blocks.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of initial values, order and dropout.")] = 0,
    eval_questions: Annotated[int, typer.Option(min=1, help="Held-out questions to classify.")] = 500,
) -> None:
    """Fine-tune a classifier on all-MiniLM-L6-v2 with transformers.Trainer and SMoA; evaluate and save it."""
    folder = minilm.locate()
    splits = split(trec.read(trec.locate()))
    checkpoint = checkpoint_of(output, resume)
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=64,
        learning_rate=lr,
        warmup_steps=steps // 10,
        save_steps=save_every,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=save_every,
        logging_steps=1,
        seed=seed,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=adapted_classifier(folder, r, num_blocks),
        args=arguments,
        train_dataset=encode(tokenizer, splits.train),
        eval_dataset=encode(tokenizer, splits.validation[:eval_questions]),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    trainer.model.print_trainable_parameters()  # the classifier's head too
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.model.save_pretrained(str(output / "adapter"))
    test = encode(tokenizer, splits.test[:eval_questions])
    share = trainer.evaluate(test, metric_key_prefix="test")["test_accuracy"]
    print(f"Accuracy on {len(test)} test questions: {Score(round(share * len(test)), len(test))}")
    print(f"Adapter and head saved in {output / 'adapter'}")


def adapted_classifier(folder: Path, r: int, num_blocks: int) -> Any:
    """Return the model with a new head and a new adapter on its linear layers, both to be trained."""
    base = AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=len(CLASSES),
        id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
        dtype=torch.float32,
    )
    config = SMoAConfig(
        task_type=TaskType.SEQ_CLS,  # PEFT then trains and saves the head
        r=r,
        num_blocks=num_blocks,
        target_modules=["query", "key", "value", "dense"],
    )
    return get_peft_model(base, config)


def encode(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Return the questions' tokens and classes, for the collator to pad."""
    texts = [question.prompt.removesuffix(trec.PROMPT_END) for question in questions]
    rows = tokenizer(texts, truncation=True).input_ids
    labels = [CLASSES.index(question.answer) for question in questions]
    return [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of questions whose class scored highest."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


main = partial(run_command, classify)  # bad input is told in one line

if __name__ == "__main__":
    sys.exit(main())
