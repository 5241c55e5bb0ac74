"""Fine-tune a causal language model to answer questions with one word, and show what that cost and gained.

    python examples/finetune.py                     # SmolLM2-135M, TREC question classification, SMoA
    python examples/finetune.py --method lora       # the same job with PEFT's LoRA
    python examples/finetune.py --model DIR --data questions.jsonl
    torchrun --nproc-per-node 2 examples/finetune.py --distributed fsdp     # or ddp, tp: see parallel.py

Needs no network once its packages are installed.
"""

import os

# Read when the libraries are imported: everything is on disk already, and the bars below are ours alone.
os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
# libgomp's idle threads spin 300,000 times before they sleep, 1,000 where it knows of more threads than cores. It does
# not know of other programs: beside two busy ones a step took 5.4 s so, 3.8 s with the 1,000 (alone 1.4 and 1.6 s).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import smollm2
import torch
import trec
import typer
from adapters import LEARNING_RATE, NAME, AdapterOptions, Method, adapt, adapted_layers, lora_parameters
from checkpoints import Checkpoints
from job import Job, console, run
from options import count, natural, positive, probability
from parallel import Kind, join, lost_process, own_device
from questions import Encoder, read_jsonl, split
from run_folder import RunFolder
from safetensors import SafetensorError
from training import DivergedError
from transformers import AutoModelForCausalLM, AutoTokenizer

app = typer.Typer(add_completion=False)


@app.command()
def finetune(
    context: typer.Context,
    method: Annotated[Method, typer.Option(help="The adapter: SMoA, or PEFT's LoRA or HiRA.")] = "smoa",
    model: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a causal language model. Default: SmolLM2-135M-Instruct, dequantised Q4_1."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help='JSONL file, {"prompt": "…", "answer": "…"} per line. Only the answers\' first tokens are'
            " trained, so those must differ. Default: TREC question classification."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for adapter, summary and loss curve. Default: runs/finetune-METHOD."),
    ] = None,
    steps: Annotated[int, typer.Option(parser=count, metavar="N", help="Optimizer steps.")] = 60,
    batch_size: Annotated[int, typer.Option(parser=count, metavar="N", help="Questions per step.")] = 16,
    lr: Annotated[
        float | None,
        typer.Option(
            parser=positive,
            metavar="NUMBER",
            help=f"Peak learning rate. Default: {', '.join(f'{k} {v:g}' for k, v in LEARNING_RATE.items())}.",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            parser=natural,
            metavar="N",
            help="Of the adapter's initial values and the order of the questions.",
        ),
    ] = 0,
    r: Annotated[
        int,
        # Two names: torchrun takes a --r after the script's name for an abbreviation of its own options.
        typer.Option("--r", "--rank", parser=count, metavar="N", help="Rank budget of the adapter."),
    ] = 8,
    num_blocks: Annotated[
        int | None,
        typer.Option(
            parser=count, metavar="N", help="SMoA's spectral blocks; they share the rank budget. Default: 2."
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            parser=positive, metavar="NUMBER", help="The scaling of SMoA and LoRA is alpha / r. Default: r."
        ),
    ] = None,
    dropout: Annotated[
        float,
        typer.Option(
            parser=probability,
            metavar="NUMBER",
            help="Dropout on the adapter's input, at least 0 and below 1.",
        ),
    ] = 0.0,
    target_modules: Annotated[
        str, typer.Option(help="Names of the linear layers to adapt, separated by commas.")
    ] = "q_proj,k_proj,v_proj,up_proj,down_proj",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float64"],
        typer.Option(help="Of the frozen model; the adapter is float32."),
    ] = "float32",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N. Default: cuda where there is one, else cpu.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            parser=count, metavar="N", help="CPU threads. Default: PyTorch's choice (OMP_NUM_THREADS)."
        ),
    ] = None,
    eval_questions: Annotated[
        int,
        typer.Option(parser=count, metavar="N", help="Held-out questions to answer before and after."),
    ] = 500,
    eval_split: Annotated[
        Literal["test", "validation"], typer.Option(help="Their split. Choose settings on validation only.")
    ] = "test",
    distributed: Annotated[
        Kind | None,
        typer.Option(help="How the processes that torchrun or accelerate launch started share the work."),
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(parser=count, metavar="N", help="Steps between checkpoints. Default: none.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the last checkpoint in --output, whatever number of processes wrote it.",
        ),
    ] = False,
) -> None:
    """Fine-tune a causal language model to answer questions with one word; show what that cost and gained."""
    lr = LEARNING_RATE[method] if lr is None else lr
    targets = tuple(name.strip() for name in target_modules.split(","))
    with blaming("the adapter's options"):
        config = AdapterOptions(method, r, num_blocks, alpha, dropout, targets).config()
    with blaming("--device"):
        place = usable_device(device)
    with blaming("--distributed"):
        place = own_device(place)
        team = join(distributed, place)
        context.call_on_close(team.leave)
        console.quiet = not team.leads
    if batch_size % team.shares:
        raise typer.BadParameter(
            f"{team.shares} processes cannot share {batch_size} questions evenly", param_hint="--batch-size"
        )
    with blaming("--output"):
        folder = RunFolder(output or Path("runs") / f"finetune-{method}")
        if team.leads:
            folder.recover()
    with blaming("--data"):
        questions = trec.read(trec.locate()) if data is None else read_jsonl(data)
        splits = split(questions)

    torch.manual_seed(seed)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with blaming("--model"), console.status("Loading the model (half a minute the first time)"):
            base_folder = smollm2.cached_model() if model is None else existing_model(model)
            tokenizer = AutoTokenizer.from_pretrained(base_folder)
            base: Any = AutoModelForCausalLM.from_pretrained(base_folder, dtype=getattr(torch, dtype)).to(
                place
            )
        with blaming("--data"):
            answers = {question.answer for question in questions}
            longest = getattr(base.config.get_text_config(), "max_position_embeddings", sys.maxsize)
            encoder = Encoder(tokenizer, answers, longest)
            encoder.check(questions)
        with blaming("--target-modules"):
            lora_size = lora_parameters(adapted_layers(base, targets), r)
        with blaming("the adapter's options"), team.injecting():
            adapted = adapt(base, config)
        options = {k: str(v) if isinstance(v, Path) else v for k, v in context.params.items()}
        checkpoints = Checkpoints(folder.checkpoints, options, team)
        with blaming("--resume"):
            checkpoints.prepare(resume)
        with blaming("--distributed"):
            trained = team.spread(adapted)
        name = smollm2.NAME if model is None else base_folder.name
        run(
            Job(
                title=f"{NAME[method]} on {name}",
                options=options,
                model=adapted,
                trained=trained,
                base_folder=base_folder,
                encoder=encoder,
                train=splits.train,
                held_out=getattr(splits, eval_split)[:eval_questions],
                lora_parameters=lora_size,
                folder=folder,
                device=place,
                steps=steps,
                batch_size=batch_size,
                lr=lr,
                seed=seed,
                team=team,
                checkpoints=checkpoints,
                checkpoint_every=checkpoint_every,
                resume=resume,
            )
        )
    except KeyboardInterrupt:
        state = f"the adapter is in {folder.adapter}" if folder.adapter_saved else "nothing was saved"
        console.print(f"[yellow]Interrupted; {state}.[/]")
        raise typer.Exit(128 + signal.SIGINT) from None


@contextmanager
def blaming(option: str) -> Iterator[None]:
    """Turn what a wrong ``option`` makes libraries raise into a one-line error that names the option."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise typer.BadParameter(" ".join(str(error).split()), param_hint=option) from error


def usable_device(name: str | None) -> torch.device:
    """Return the device called ``name``, or the best one.

    Raises:
        ValueError: if this machine, or this build of PyTorch, does not have it.
    """
    count = torch.cuda.device_count()
    allowed = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if name is not None and name not in allowed:
        raise ValueError(f"{name!r} is not one of {', '.join(allowed)}")
    return torch.device(name or ("cuda" if count else "cpu"))


def existing_model(folder: Path) -> Path:
    """Return ``folder``, absolute, for the adapter's configuration refers to it.

    Raises:
        FileNotFoundError: if it holds no ``config.json``; a name on a model hub is not looked up.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a saved model (no config.json)")
    return folder.resolve()


def main() -> int:
    """Run the command; report bad input in one line."""
    # SIGTERM then tidies up as Ctrl-C does, instead of leaving half-written files.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return app(standalone_mode=False) or 0
    except typer.TyperException as error:
        print(f"error: {error.format_message()}", file=sys.stderr)
        return error.exit_code
    except (DivergedError, OSError, SafetensorError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not lost_process(error):
            raise
        signal.signal(
            signal.SIGTERM, signal.SIG_IGN
        )  # which the launcher sends now: this one is ending anyway
        print(
            "error: another process of this run has ended, so this one cannot go on; --resume continues from the last "
            "checkpoint",
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
