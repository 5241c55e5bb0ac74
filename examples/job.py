"""One fine-tuning run, from the first question to the adapter's check in a fresh process."""

import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from checkpoints import Checkpoints
from machine import describe, peak_memory_bytes
from parallel import Team
from peft import PeftModel
from questions import Encoder, Question
from report import evaluation_progress, examples_table, training_progress
from rich.console import Console
from rich.table import Table
from run_folder import RunFolder
from torch import nn
from training import Score, StopRequest, TrainingRecord, answer, score, shuffled_batches, train
from verify import Verdict, verify_in_fresh_process

STARTED = time.perf_counter()
VERIFIED_PROMPTS = 16

console = Console(highlight=False)


@dataclass(frozen=True)
class Job:
    """Everything that a run needs, checked."""

    title: str
    options: dict[str, Any]  # for the record
    model: PeftModel
    trained: nn.Module  # the same, as the team trains it
    base_folder: Path
    encoder: Encoder
    train: list[Question]
    held_out: list[Question]
    lora_parameters: int
    folder: RunFolder
    device: torch.device
    steps: int
    batch_size: int
    lr: float
    seed: int
    team: Team
    checkpoints: Checkpoints
    checkpoint_every: int | None
    resume: bool


def run(job: Job) -> None:
    """Evaluate, train, save, evaluate, reload in a fresh process; record each result as soon as it is known.

    Raises:
        DivergedError: if the loss is no longer a number; nothing is saved then.
        typer.Exit: with 130 (143) if SIGINT (SIGTERM) came while it trained, after saving; with 1 if the reloaded
            adapter gives other outputs.
    """
    trainable, total = job.model.get_nb_trainable_parameters()
    console.rule(job.title)
    console.print(
        f"{total - trainable:,} frozen parameters, {trainable:,} trained; LoRA of the same rank trains"
        f" {job.lora_parameters:,} ({trainable / job.lora_parameters:.2f}×)"
    )
    with job.model.disable_adapter():
        before = _answers(job, "Answering before")
    score_before = score(before, job.held_out)
    console.print(f"Accuracy before training: {score_before} of {len(job.held_out)} questions")

    with StopRequest() as stop:
        record = _train(job, stop)
        if record.steps == 0:
            raise KeyboardInterrupt  # nothing was trained, so nothing is worth saving
        summary = {
            "status": "interrupted" if stop.signal else "trained",
            "title": job.title,
            "machine": describe(job.device),
            "options": job.options,
            "learning_rate": job.lr,
            "training_questions": len(job.train),
            "trainable_parameters": trainable,
            "lora_parameters": job.lora_parameters,
            "steps": record.steps,
            "median_step_seconds": record.median_step_seconds,
            "tokens_per_second": record.tokens_per_second,
            "peak_memory_bytes": peak_memory_bytes(job.device),
            "loss": record.loss,
            "accuracy_before": _recorded(score_before),
        }
        state = job.team.whole_adapter(job.model)
        if job.team.leads:
            summary["adapter_bytes"] = job.folder.save_adapter(job.model, state)
            job.folder.save_summary(summary)
            job.folder.save_loss_curve(record.loss, job.title)
    if job.team.leads:
        console.print(f"Adapter saved in {job.folder.adapter} ({summary['adapter_bytes'] / 2**20:.1f} MiB)")
    if stop.signal:
        name = signal.Signals(stop.signal).name
        console.print(
            f"[yellow]Stopped by {name} after step {record.steps} of {job.steps}; evaluation is skipped.[/]"
        )
        raise typer.Exit(128 + stop.signal)

    after = _answers(job, "Answering after")
    score_after = score(after, job.held_out)
    summary["accuracy_after"] = _recorded(score_after)
    if job.team.leads:
        job.folder.save_summary(summary)
    console.print(examples_table(job.held_out, before, after))

    with console.status("Loading the adapter in a fresh process"):
        batch = job.encoder.batch(job.held_out[:VERIFIED_PROMPTS]).to(job.device)
        verdict = verify_in_fresh_process(
            job.model, batch, job.base_folder, job.folder.adapter, job.team.leads
        )
    if verdict is None:
        return
    summary |= {"status": "complete", "fresh_process": asdict(verdict)}
    summary["total_seconds"] = time.perf_counter() - STARTED
    job.folder.save_summary(summary)
    console.print(_results(job, summary, score_before, score_after, verdict))
    if not verdict.agrees:
        console.print("[red]The reloaded or the merged adapter does not give the trained model's outputs.[/]")
        raise typer.Exit(1)


def _train(job: Job, stop: StopRequest) -> TrainingRecord:
    batches = shuffled_batches(job.train, job.encoder, job.batch_size, job.seed, job.team)
    with training_progress(console, job.steps) as show:
        return train(
            job.trained,
            batches,
            steps=job.steps,
            lr=job.lr,
            device=job.device,
            stop=stop,
            on_step=show,
            seed=job.seed,
            team=job.team,
            checkpoints=job.checkpoints,
            checkpoint_every=job.checkpoint_every,
            resume=job.resume,
        )


def _answers(job: Job, title: str) -> list[str]:
    with evaluation_progress(console, title, len(job.held_out)) as show:
        return answer(job.model, job.encoder, job.held_out, job.batch_size, job.device, show)


def _recorded(score: Score) -> dict[str, float]:
    return asdict(score) | {"accuracy": score.accuracy, "standard_error": score.standard_error}


def _results(job: Job, summary: dict[str, Any], before: Score, after: Score, verdict: Verdict) -> Table:
    table = Table(title=f"{job.title}, {summary['machine']['label']}", show_header=False)
    table.add_row(f"Accuracy, {len(job.held_out)} held-out questions", f"{before} → {after}")
    trainable, lora = summary["trainable_parameters"], summary["lora_parameters"]
    table.add_row("Trainable parameters", f"{trainable:,}; LoRA of the same rank: {lora:,}")
    table.add_row("Median time of a step", f"{summary['median_step_seconds']:.2f} s")
    table.add_row("Tokens per second", f"{summary['tokens_per_second']:,.0f}")
    table.add_row("Peak memory", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB")
    table.add_row("Adapter", f"{job.folder.adapter} ({summary['adapter_bytes'] / 2**20:.1f} MiB)")
    table.add_row("Loss curve, figures", f"{job.folder.picture}, {job.folder.summary}")
    for name, deviation, tolerance in (
        ("Reloaded in a fresh process", verdict.reloaded, verdict.reloaded_tolerance),
        ("Merged there", verdict.merged, verdict.merged_tolerance),
    ):
        word = "agrees" if deviation <= tolerance else "DIFFERS"
        table.add_row(name, f"{word}: outputs within {deviation:.1e}, allowed {tolerance:.0e}")
    table.add_row("Total time, without imports", f"{summary['total_seconds']:.0f} s")
    return table
