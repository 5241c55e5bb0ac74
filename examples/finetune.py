"""Fine-tune a causal language model to answer questions with one word; show accuracy, time and memory.

    python examples/finetune.py                     # SmolLM2-135M, TREC question classification, SMoA
    python examples/finetune.py --method lora       # the same job with PEFT's LoRA
    python examples/finetune.py --model DIR --data questions.jsonl
    torchrun --nproc-per-node 2 examples/finetune.py --distributed fsdp     # or ddp, tp: see parallel.py

Needs no network once its packages are installed.
"""

import os

# Read when the libraries are imported: everything is on disk already.
os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
# libgomp's idle threads spin 300,000 times before they sleep, or 1,000 times if there are more threads than cores. It
# does not count other programs' threads. Beside two busy programs a step took 5.4 s, and 3.8 s with 1,000 spins (alone
# 1.4 and 1.6 s).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import smollm2
import torch
import trec
import typer
from adapters import LEARNING_RATE, NAME, Method, adapter_config, lora_parameters
from checkpoints import Checkpoints
from machine import describe, peak_memory_bytes
from options import run_command
from parallel import Kind, Team, join, own_device
from peft import PeftModel, get_peft_model
from questions import Encoder, Question, read_jsonl, split
from training import StopRequest, answer, score, shuffled_batches, train
from transformers import AutoModelForCausalLM, AutoTokenizer

RATES = ", ".join(f"{method} {rate:g}" for method, rate in LEARNING_RATE.items())


def finetune(
    context: typer.Context,
    method: Annotated[Method, typer.Option(help="The adapter: SMoA, or PEFT's LoRA or HiRA.")] = "smoa",
    model: Annotated[Path | None, typer.Option(help="Folder of a model. Default: SmolLM2-135M.")] = None,
    data: Annotated[
        Path | None, typer.Option(help='JSONL, {"prompt": "…", "answer": "…"} per line. Default: TREC.')
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder. Default: runs/finetune-METHOD.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 60,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per step.")] = 16,
    lr: Annotated[float | None, typer.Option(min=0, help=f"Peak learning rate. Default: {RATES}.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of initial values and the order of questions.")] = 0,
    # A second name, because torchrun takes --r, even after the script's name, as an abbreviation of its own options.
    r: Annotated[int, typer.Option("--r", "--rank", min=1, help="Rank budget of the adapter.")] = 8,
    num_blocks: Annotated[int | None, typer.Option(min=1, help="SMoA's blocks. Default: 2.")] = None,
    alpha: Annotated[float | None, typer.Option(help="The scaling is alpha / r. Default: r.")] = None,
    dropout: Annotated[float, typer.Option(min=0, max=1, help="On the adapter's input.")] = 0.0,
    target_modules: Annotated[str, typer.Option(help="Names of linear layers, separated by commas.")] = (
        "q_proj,k_proj,v_proj,up_proj,down_proj"
    ),
    dtype: Annotated[
        Literal["float32", "bfloat16", "float64"],
        typer.Option(help="Of the frozen model; the adapter is float32."),
    ] = "float32",
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one, else cpu.")] = None,
    eval_questions: Annotated[int, typer.Option(min=1, help="Held-out questions to answer.")] = 500,
    eval_split: Annotated[
        Literal["test", "validation"], typer.Option(help="Choose settings on validation only.")
    ] = "test",
    distributed: Annotated[Kind | None, typer.Option(help="How launched processes share the work.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
) -> None:
    """Fine-tune a causal language model to answer questions with one word; show accuracy, time and memory."""
    options = SimpleNamespace(**context.params)
    options.lr = LEARNING_RATE[method] if lr is None else lr
    options.output = output or Path("runs") / f"finetune-{method}"
    place = own_device(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    team = join(distributed, place)
    recorded = {k: str(v) if isinstance(v, Path) else v for k, v in context.params.items()}
    try:
        run(options, recorded, place, team)
    finally:
        team.leave()


def load(
    options: SimpleNamespace, questions: list[Question], device: torch.device, team: Team
) -> tuple[str, PeftModel, Encoder]:
    """Return a title, the model with its new adapter, and the encoder of the questions, which are all checked."""
    targets = [name.strip() for name in options.target_modules.split(",")]
    config = adapter_config(
        options.method, options.r, targets, options.num_blocks, options.alpha, options.dropout
    )
    torch.manual_seed(options.seed)
    folder = smollm2.cached_model() if options.model is None else options.model.resolve(strict=True)
    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype)).to(device)
    longest = getattr(base.config.get_text_config(), "max_position_embeddings", sys.maxsize)
    answers = {question.answer for question in questions}
    encoder = Encoder(AutoTokenizer.from_pretrained(folder), answers, longest)
    encoder.check(questions)
    with team.injecting():
        model = get_peft_model(base, config)
    name = smollm2.NAME if options.model is None else folder.name
    return f"{NAME[options.method]} on {name}", model, encoder


def run(options: SimpleNamespace, recorded: dict[str, Any], device: torch.device, team: Team) -> None:
    """Evaluate, train, save, evaluate; record each result as soon as it is known.

    Raises:
        ValueError: if an option, a file or the model does not fit the others, or the loss became infinite.
        typer.Exit: with 130 (143) if SIGINT (SIGTERM) came while it trained, after saving.
    """
    say = print if team.leads else lambda *words: None
    if options.batch_size % team.shares:
        raise ValueError(f"{team.shares} processes cannot share {options.batch_size} questions evenly")
    questions = trec.read(trec.locate()) if options.data is None else read_jsonl(options.data)
    splits = split(questions)
    title, model, encoder = load(options, questions, device, team)
    place = options.output / "checkpoints"
    checkpoints = Checkpoints(place, recorded, team, options.checkpoint_every, options.resume)
    checkpoints.prepare()
    trained = team.spread(model)

    trainable, total = model.get_nb_trainable_parameters()
    lora = lora_parameters(model, options.r)
    say(title)
    say(f"{total - trainable:,} frozen parameters, {trainable:,} trained; LoRA of this rank: {lora:,}")
    held_out: list[Question] = getattr(splits, options.eval_split)[: options.eval_questions]
    with model.disable_adapter():
        before = answer(model, encoder, held_out, options.batch_size, device)
    say(f"Accuracy before training: {score(before, held_out)} of {len(held_out)} questions")

    summary = {
        "title": title,
        "machine": describe(device),
        "options": recorded,
        "learning_rate": options.lr,
        "training_questions": len(splits.train),
        "trainable_parameters": trainable,
        "lora_parameters": lora,
        "accuracy_before": score(before, held_out).record(),
    }
    batches = shuffled_batches(splits.train, encoder, options.batch_size, options.seed, team)
    with StopRequest() as stop:
        record = train(
            trained,
            batches,
            steps=options.steps,
            lr=options.lr,
            device=device,
            stop=stop,
            say=say,
            seed=options.seed,
            team=team,
            checkpoints=checkpoints,
        )
        if not record.steps:
            raise KeyboardInterrupt  # before the first step there is nothing to save
        summary |= record.summary() | {"status": "interrupted" if stop.signal else "trained"}
        summary["peak_memory_bytes"] = peak_memory_bytes(device)
        save(options.output, summary, team, model)
    say(f"{record.median_step_seconds:.2f} s a step (median), {record.tokens_per_second:,.0f} tokens/s")
    say(f"Peak memory {summary['peak_memory_bytes'] / 2**30:.2f} GiB, {summary['machine']['label']}")
    say(f"Adapter saved in {options.output / 'adapter'}")
    if stop.signal:
        say(f"Stopped by {signal.Signals(stop.signal).name} after step {record.steps}; evaluation is skipped")
        raise typer.Exit(128 + stop.signal)
    after = answer(model, encoder, held_out, options.batch_size, device)
    summary |= {"status": "complete", "accuracy_after": score(after, held_out).record()}
    save(options.output, summary, team)
    for question, *answers in list(zip(held_out, before, after, strict=True))[:3]:
        say(f"{question.prompt!r}: before {answers[0]}, after {answers[1]}, right is {question.answer}")
    say(f"Accuracy: {score(before, held_out)} before, {score(after, held_out)} after training")


def save(output: Path, summary: dict[str, Any], team: Team, model: PeftModel | None = None) -> None:
    """Write the adapter, if one is given, and ``summary.json``, each of them whole or not at all."""
    state = None if model is None else team.whole_adapter(model)
    if team.leads:
        if model is not None:
            model.save_pretrained(str(output / "adapter"), state_dict=state)
        unfinished = output / "summary.json.partial"
        unfinished.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(unfinished, output / "summary.json")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; report bad input in one line."""
    # SIGTERM then cleans up like Ctrl-C, and leaves no half-written files.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run_command(finetune, arguments)


if __name__ == "__main__":
    sys.exit(main())
