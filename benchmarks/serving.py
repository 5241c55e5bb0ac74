"""The cost of adapters that vLLM serves unmerged: time per output token, prefill, loading.

    python -m benchmarks.serving BASE FOLDER [--dtype bfloat16]     # in vLLM's environment; interleaved medians
    python -m benchmarks.serving BASE FOLDER --against-peft         # 64 prompts in one batch; no times
    python -m benchmarks.serving BASE FOLDER --processor-time       # the same on a busy machine, with one thread
    python -m benchmarks.serving --predict                          # decode on an H100; nothing runs

FOLDER gets adapters of BASE with random factors, made the first time (PEFT is needed for that), and the merged model.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SEQUENCES, TOKENS, PREFILL = 8, 17, 512


def make(base: str, folder: Path) -> None:
    """Write eight adapters of each kind with random factors, and the model that one SMoA adapter merges into."""
    import torch
    from peft import HiraConfig, LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from smoa_kernels.peft import SMoAConfig, merge_to_folder

    kinds: dict[str, Callable[[], Any]] = {
        "smoa4-": lambda: SMoAConfig(r=8, num_blocks=4, target_modules=TARGETS),
        "smoa2-": lambda: SMoAConfig(r=8, num_blocks=2, target_modules=TARGETS),
        "hira-": lambda: HiraConfig(r=8, target_modules=TARGETS),
        "lora-": lambda: LoraConfig(r=8, target_modules=TARGETS),
    }
    for kind, config in kinds.items():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config())
        for number in range(8):
            torch.manual_seed(number)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if any(key in name for key in ("smoa_B", "hira_B", "lora_B")):
                        parameter.normal_(std=0.02 if kind == "lora-" else 1)
            model.save_pretrained(str(folder / f"{kind}{number}"))
    merge_to_folder(base, folder / "smoa4-0", folder / "merged")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "merged")


def seconds(engine: Any, adapters: list[Any], prompt: int, tokens: int, clock: Callable[[], float]) -> float:
    """Seconds of a batch with one sequence per adapter; the prompts are not in the prefix cache."""
    from vllm import SamplingParams

    engine.reset_prefix_cache()
    prompts = [
        {"prompt_token_ids": list(range(100 + 7 * i, 100 + 7 * i + prompt))} for i in range(len(adapters))
    ]
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    start = clock()
    engine.generate(prompts, sampling, lora_request=adapters, use_tqdm=False)
    return clock() - start


def against_peft(engine: Any, base: str, folder: Path, requests: dict[str, Any]) -> str:
    """Serve 64 prompts over five models in one batch, and compare with PEFT, one model after another."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams

    import smoa_kernels.peft  # noqa: F401  # registers the method with PEFT

    names = [None, "smoa2-0", "smoa4-0", "hira-0", "lora-0"]
    generator = torch.Generator().manual_seed(0)
    given = [
        (names[i % 5], torch.randint(100, 40_000, (5 + i,), generator=generator).tolist()) for i in range(64)
    ]
    outputs = engine.generate(
        [{"prompt_token_ids": ids} for _, ids in given],
        SamplingParams(temperature=0, max_tokens=16, logprobs=1, ignore_eos=True, detokenize=False),
        lora_request=[requests.get(name or "") for name, _ in given],
        use_tqdm=False,
    )
    total, equal, worst, as_base = 0, 0, 0.0, 0
    for name in names:
        model = AutoModelForCausalLM.from_pretrained(base)
        adapted = model if name is None else PeftModel.from_pretrained(model, str(folder / name))
        for (own, ids), output in zip(given, outputs, strict=True):
            if own == name:
                tokens = list(output.outputs[0].token_ids)
                scores = [
                    step[token].logprob
                    for step, token in zip(output.outputs[0].logprobs, tokens, strict=True)
                ]
                with torch.no_grad():
                    logits = adapted(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1].float()
                found = logits.log_softmax(-1)[range(len(tokens)), tokens]
                worst = max(worst, float((found - torch.tensor(scores)).abs().max()))
                equal += int((logits.argmax(-1) == torch.tensor(tokens)).sum())
                total += len(tokens)
                if name is not None:
                    with torch.no_grad(), adapted.disable_adapter():
                        plain = adapted(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
                    as_base += int((plain.argmax(-1) == torch.tensor(tokens)).sum())
    return (
        f"64 prompts over {len(names)} models in one batch: {equal} of {total} greedy tokens are PEFT's, "
        f"log-probabilities within {worst:.1e}; {as_base} of the adapters' tokens are the base's too"
    )


def predicted(batch: int, rank: int) -> float:
    """Time of a decode step's products with an adapter for each sequence, over the base's alone, on an H100 in bf16.

    The base's product has one row per sequence, the adapters' have `rank`. Each takes the longer of reading W0 and its
    arithmetic; kernels' starts and the factors' bytes are left out.

    >>> predicted(8, 8)  # bound by memory: W0 is read twice
    2.0
    """
    from smoa_kernels.tuning.gpus import GPUS

    rates = GPUS["h100"].rates("bf16")

    def seconds_per_weight(rows: int) -> float:
        return max(2 / rates.bytes_per_second, 2 * rows / rates.flops_per_second)

    return (seconds_per_weight(batch) + seconds_per_weight(batch * rank)) / seconds_per_weight(batch)


def print_predicted() -> None:
    """Print rows and time by batch and rank."""
    ranks = (4, 8, 16, 32)
    print(f"| sequences | {' | '.join(f'r={rank}' for rank in ranks)} |")
    print("|---" * (1 + len(ranks)) + "|")
    for batch in (1, 4, 8, 16, 32, 64, 128):
        cells = [f"{batch * rank} rows, {predicted(batch, rank):.1f}" for rank in ranks]
        print(f"| {batch} | {' | '.join(cells)} |")


def main() -> None:
    """Print one table, or the comparison with PEFT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", nargs="?")
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against-peft", action="store_true")
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--summary", type=Path, help="JSON file for the README's row")
    options = parser.parse_args()
    if options.predict:
        print_predicted()
        return
    if options.folder is None:
        parser.error("give BASE and FOLDER")
    if not (options.folder / "merged").exists():
        make(options.base, options.folder)

    if options.processor_time:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    common: dict[str, Any] = {
        "dtype": options.dtype,
        "max_model_len": 640,
        "max_num_seqs": 64 if options.against_peft else 8,
        "enforce_eager": True,
    }
    engine = LLM(options.base, enable_lora=True, max_lora_rank=8, max_loras=8, max_cpu_loras=32, **common)
    numbers = {name: i + 1 for i, name in enumerate(sorted(path.name for path in options.folder.glob("*-?")))}
    requests = {name: LoRARequest(name, i, str(options.folder / name)) for name, i in numbers.items()}
    if options.against_peft:
        print(against_peft(engine, options.base, options.folder, requests))
    else:
        merged = LLM(str(options.folder / "merged"), **common)
        print_times(engine, merged, requests, options)


def print_times(engine: Any, merged: Any, requests: dict[str, Any], options: argparse.Namespace) -> None:
    """Print decode and prefill of each case over the merged model's, interleaved, and how long loading took."""
    import torch

    from smoa_kernels.backends import resolve_backend

    from .machine import cpu_name

    clock = time.process_time if options.processor_time else time.perf_counter
    loading = []
    for name in [f"{kind}-{i}" for kind in ("smoa4", "lora") for i in range(4)]:
        start = clock()
        engine.llm_engine.add_lora(requests[name])
        loading.append(f"{name} {clock() - start:.2f}")

    kinds = ("smoa4-", "hira-", "lora-")
    cases: dict[str, tuple[Any, list[Any]]] = {
        "merged": (merged, [None] * SEQUENCES),
        "base": (engine, [None] * SEQUENCES),
    }
    cases |= {
        f"{kind}0, {SEQUENCES} sequences": (engine, [requests[f"{kind}0"]] * SEQUENCES) for kind in kinds
    }
    cases |= {
        f"{kind}0 to 7, one each": (engine, [requests[f"{kind}{i}"] for i in range(8)]) for kind in kinds
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(options.rounds + 1):
        for name, (model, adapters) in cases.items():
            # Loads the adapters into slots, and prepares a prompt and a decode step.
            seconds(model, adapters, 8, 2, clock)
            decode = seconds(model, adapters, 8, TOKENS, clock) - seconds(model, adapters, 8, 1, clock)
            prefill = seconds(model, adapters[:1], PREFILL, 1, clock)
            times[name].append((decode / (TOKENS - 1), prefill))
    kept = "W0 not kept" if os.environ.get("SMOA_VLLM_KEEP_W0") == "0" else "W0 kept"
    kept += ", processor time of one thread" if options.processor_time else ""
    print(
        f"| {options.dtype}, {kept} | ms per output token | over merged | ms for {PREFILL} tokens | over merged |"
    )
    print("|---|---|---|---|---|")
    # The first round reads W0 and fills caches. Ratios are medians over rounds.
    per_token = {}
    for name in cases:
        rows = list(zip(times[name][1:], times["merged"][1:], strict=True))
        ms = [1e3 * statistics.median(own[i] for own, _ in rows) for i in (0, 1)]
        ratios = [statistics.median(own[i] / other[i] for own, other in rows) for i in (0, 1)]
        per_token[name] = ratios[0]
        print(f"| {name} | {ms[0]:.1f} | {ratios[0]:.2f} | {ms[1]:.0f} | {ratios[1]:.2f} |")
    if options.summary:
        found = {kind.rstrip("4-"): round(per_token[f"{kind}0, {SEQUENCES} sequences"], 3) for kind in kinds}
        threads = 1 if options.processor_time else torch.get_num_threads()
        summary = {"device": cpu_name(), "threads": threads, "token_over_merged": found}
        options.summary.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    backend = resolve_backend("auto", torch.device("cpu"), getattr(torch, options.dtype), 2)
    print(f"\nThe operator's backend: {backend}. Loading, s: {', '.join(loading)}")


if __name__ == "__main__":
    main()
