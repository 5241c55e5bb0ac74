"""Fine-tune a classifier on all-MiniLM-L6-v2 with ``transformers.Trainer`` and SMoA through PEFT.

    python examples/classify.py             # TREC question classification: progress, accuracy, a saved adapter
    python examples/classify.py --resume    # go on from the last checkpoint of a run that was stopped

Reads installed packages and writes its output folder: nothing is downloaded, nothing is pushed anywhere.
"""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}  # read when the libraries are imported

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import minilm
import torch
import trec
import typer
from options import count, natural, positive, run_command
from peft import TaskType, get_peft_model
from questions import Question, split
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from training import Score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from smoa_kernels.peft import SMoAConfig

# On the validation questions after 150 steps: 5e-3 88.8 %, 1e-2 90.8, 3e-2 92.0.
LEARNING_RATE = 3e-2
CLASSES = sorted(trec.CLASSES.values())
LINE_EVERY = 20  # steps, where there is no terminal to redraw a bar on

console = Console(highlight=False)
app = typer.Typer(add_completion=False)


@app.command()
def classify(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder for checkpoints and the adapter.")] = Path(
        "runs/classify"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in it.")] = False,
    steps: Annotated[int, typer.Option(parser=count, metavar="N", help="Optimizer steps.")] = 200,
    save_every: Annotated[
        int, typer.Option(parser=count, metavar="N", help="Steps from one checkpoint to the next.")
    ] = 50,
    batch_size: Annotated[int, typer.Option(parser=count, metavar="N", help="Questions per step.")] = 32,
    lr: Annotated[
        float, typer.Option(parser=positive, metavar="NUMBER", help="Peak learning rate.")
    ] = LEARNING_RATE,
    r: Annotated[int, typer.Option(parser=count, metavar="N", help="Rank budget of the adapter.")] = 16,
    num_blocks: Annotated[int, typer.Option(parser=count, metavar="N", help="Spectral blocks.")] = 2,
    seed: Annotated[
        int, typer.Option(parser=natural, metavar="N", help="Of initial values, order and dropout.")
    ] = 0,
    eval_questions: Annotated[
        int, typer.Option(parser=count, metavar="N", help="Held-out questions to classify.")
    ] = 500,
) -> None:
    """Fine-tune a classifier on all-MiniLM-L6-v2 with transformers.Trainer and SMoA; evaluate and save it."""
    try:
        folder = minilm.locate()
        splits = split(trec.read(trec.locate()))
        settings = {k: v for k, v in context.params.items() if k not in ("output", "resume")}
        checkpoint = open_run(output, settings, resume)
        set_seed(seed)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = adapted_classifier(folder, r, num_blocks)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
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
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=encode(tokenizer, splits.train),
        eval_dataset=encode(tokenizer, splits.validation[:eval_questions]),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        callbacks=[Progressing(steps)],
    )
    trainer.remove_callback(PrinterCallback)
    trainable, total = model.get_nb_trainable_parameters()
    console.rule(f"SMoA on {minilm.NAME}")
    console.print(
        f"{total - trainable:,} frozen parameters, {trainable:,} trained (the classifier's head too)"
    )
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    report(trainer, encode(tokenizer, splits.test[:eval_questions]), output / "adapter")


def open_run(output: Path, settings: dict[str, Any], resume: bool) -> Path | None:
    """Note a new run's settings in its folder; return the checkpoint to go on from, None for a new run.

    Raises:
        ValueError: if a new run's folder is not empty, or there is nothing to resume with these settings.
    """
    noted = output / "run.json"
    if not resume:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ValueError(f"--output {output} is not a new or empty folder; --resume goes on with a run")
        output.mkdir(parents=True, exist_ok=True)
        noted.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return None
    # The Trainer writes its state last: a checkpoint without it was cut short.
    whole = [state.parent for state in output.glob("checkpoint-*/trainer_state.json")]
    if not whole or not noted.is_file():
        raise ValueError(f"--resume: there is no checkpoint in {output}")
    before = json.loads(noted.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if before.get(name) != value:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"--resume: the run in {output} has {option} {before.get(name)}, not {value}")
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]))


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
        task_type=TaskType.SEQ_CLS,  # which trains and saves the head
        r=r,
        num_blocks=num_blocks,
        target_modules=["query", "key", "value", "dense"],
    )
    return get_peft_model(base, config)


def encode(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Return what the collator pads into batches."""
    texts = [question.prompt.removesuffix(trec.PROMPT_END) for question in questions]
    rows = tokenizer(texts, truncation=True).input_ids
    labels = [CLASSES.index(question.answer) for question in questions]
    return [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of questions whose class scored highest."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def report(trainer: Trainer, held_out: list[dict[str, Any]], folder: Path) -> None:
    """Save the adapter; say how well it classifies what was held out."""
    trainer.model.save_pretrained(str(folder))
    share = trainer.evaluate(held_out, metric_key_prefix="test")["test_accuracy"]
    score = Score(round(share * len(held_out)), len(held_out))
    console.print(f"Accuracy on {len(held_out)} test questions: {score}")
    size = sum(file.stat().st_size for file in folder.iterdir())
    console.print(f"Adapter and head saved in {folder} ({size / 2**20:.1f} MiB)")


class Progressing(TrainerCallback):
    """Shows the step and its loss, and the accuracy at each checkpoint."""

    def __init__(self, steps: int) -> None:
        columns = (
            TextColumn("Training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[now]}"),
        )
        self.progress = Progress(
            *columns,
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("", total=steps, now="")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar, where a resumed run stood."""
        self.progress.update(self.task, completed=state.global_step)
        self.progress.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Show what the Trainer logs."""
        step = state.global_step
        if "eval_accuracy" in logs:
            console.print(f"step {step}: accuracy on validation {logs['eval_accuracy']:.1%}")
        if "loss" in logs:
            now = f"loss {logs['loss']:.3f}"
            self.progress.update(self.task, completed=step, now=now)
            if not console.is_terminal and (step % LINE_EVERY == 0 or step == state.max_steps):
                console.print(f"step {step} of {state.max_steps}  {now}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the bar."""
        self.progress.stop()


def main(arguments: list[str] | None = None) -> int:
    """Run the command; report bad input in one line."""
    return run_command(app, arguments, "interrupted; --resume goes on from the last checkpoint")


if __name__ == "__main__":
    sys.exit(main())
