"""The cost of adapters that vLLM serves unmerged: time per output token, prefill, loading.

    python -m benchmarks.serving BASE FOLDER [--dtype bfloat16]     # in vLLM's environment

FOLDER gets adapters of BASE with random factors, made the first time (PEFT is needed for that), and the merged model.
Every case takes its turn in each round. Times are processor time of one thread, so other programs matter little.
"""

from __future__ import annotations

import os

# Read when torch and vLLM are imported.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from smoa_kernels.backends import resolve_backend

from .machine import cpu_name
from .protocol import Turns
from .tables import shown, table

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SEQUENCES, TOKENS, PREFILL = 8, 17, 512
KINDS = {"smoa": "smoa4-", "hira": "hira-", "lora": "lora-"}
"""The names of adapters that are timed begin so."""


def make(base: str, folder: Path) -> None:
    """Write eight adapters of each kind with random factors, and the model that one SMoA adapter merges into."""
    import torch
    from peft import HiraConfig, LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from smoa_kernels.peft import SMoAConfig, merge_to_folder

    kinds: dict[str, Callable[[], Any]] = {
        "smoa4-": lambda: SMoAConfig(r=8, num_blocks=4, target_modules=TARGETS),
        "hira-": lambda: HiraConfig(r=8, target_modules=TARGETS),
        "lora-": lambda: LoraConfig(r=8, target_modules=TARGETS),
    }
    for kind, config in kinds.items():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config())
        for number in range(8):
            torch.manual_seed(number)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith(".B") or any(key in name for key in ("hira_B", "lora_B")):
                        parameter.normal_(std=0.02 if kind == "lora-" else 1)
            model.save_pretrained(str(folder / f"{kind}{number}"))
    merge_to_folder(base, folder / "smoa4-0", folder / "merged")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "merged")


def seconds(engine: Any, adapters: list[Any], prompt: int, tokens: int) -> float:
    """Seconds of a batch with one sequence per adapter; the prompts are not in the prefix cache."""
    from vllm import SamplingParams

    engine.reset_prefix_cache()
    prompts = [
        {"prompt_token_ids": list(range(100 + 7 * i, 100 + 7 * i + prompt))} for i in range(len(adapters))
    ]
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    start = time.process_time()
    engine.generate(prompts, sampling, lora_request=adapters, use_tqdm=False)
    return time.process_time() - start


def phases(engine: Any, adapters: list[Any]) -> dict[str, float]:
    """Milliseconds of an output token of all sequences, and of one long prompt."""
    seconds(engine, adapters, 8, 2)  # loads the adapters into slots, and prepares a prompt and a decode step
    decode = seconds(engine, adapters, 8, TOKENS) - seconds(engine, adapters, 8, 1)
    prefill = seconds(engine, adapters[:1], PREFILL, 1)
    return {"a token": 1e3 * decode / (TOKENS - 1), f"{PREFILL} tokens": 1e3 * prefill}


def measure(base: str, folder: Path, dtype: str, rounds: int, summary: Path | None) -> None:
    """Print decode and prefill of each case over the merged model's, and how long loading took."""
    import torch
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    common: dict[str, Any] = {"dtype": dtype, "max_model_len": 640, "max_num_seqs": 8, "enforce_eager": True}
    engine = LLM(base, enable_lora=True, max_lora_rank=8, max_loras=8, max_cpu_loras=32, **common)
    merged = LLM(str(folder / "merged"), **common)
    requests = {
        path.name: LoRARequest(path.name, i, str(path))
        for i, path in enumerate(sorted(folder.glob("*-?")), 1)
    }
    loading = []
    for name in [f"{kind}-{i}" for kind in ("smoa4", "lora") for i in range(4)]:
        start = time.process_time()
        engine.llm_engine.add_lora(requests[name])
        loading.append(f"{name} {time.process_time() - start:.2f}")

    nobody: list[Any] = [None] * SEQUENCES
    cases = {"merged": (merged, nobody), "base": (engine, nobody)}
    for kind, name in KINDS.items():
        cases[f"{kind}, one adapter"] = engine, [requests[f"{name}0"]] * SEQUENCES
        cases[f"{kind}, {SEQUENCES} adapters"] = engine, [requests[f"{name}{i}"] for i in range(SEQUENCES)]
    turns = Turns({name: partial(phases, *case) for name, case in cases.items()}, "merged")
    turns.warm_up(1)  # reads W0 and fills caches
    for _ in range(rounds):
        turns.round()
    found = turns.comparisons()
    kept = "W0 not kept" if os.environ.get("SMOA_VLLM_KEEP_W0") == "0" else "W0 kept"
    headings = [words for phase in found for words in (f"ms, {phase}", "over merged")]
    rows = [
        (n, *(shown(figure) for f in found.values() for figure in (f.time(n), f.ratio(n)))) for n in cases
    ]
    print(table((f"{dtype}, {kept}", *headings), rows))
    if summary:
        figures = {kind: found["a token"].ratio(f"{kind}, one adapter") for kind in KINDS}
        ratios = {kind: round(figure.median, 3) for kind, figure in figures.items() if figure}
        report = {"device": cpu_name(), "threads": 1, "token_over_merged": ratios}
        summary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    backend = resolve_backend("auto", torch.device("cpu"), getattr(torch, dtype), 2)
    print(f"The operator's backend: {backend}. Loading, s: {', '.join(loading)}")


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--summary", type=Path, help="JSON file for the README's row")
    options = parser.parse_args()
    if not (options.folder / "merged").exists():
        make(options.base, options.folder)
    measure(options.base, options.folder, options.dtype, options.rounds, options.summary)


if __name__ == "__main__":
    main()
