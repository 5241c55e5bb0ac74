"""What adapters cost when vLLM serves them unmerged: time per output token, prefill, loading.

    python -m benchmarks.serving BASE FOLDER [--dtype bfloat16]     # in vLLM's environment; interleaved medians

FOLDER gets adapters of BASE with random factors, made the first time (PEFT is needed for that), and the merged model.
"""

import argparse
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
                        parameter.normal_(std=0.02)
            model.save_pretrained(str(folder / f"{kind}{number}"))
    merge_to_folder(base, folder / "smoa4-0", folder / "merged")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "merged")


def seconds(engine: Any, adapters: list[Any], prompt: int, tokens: int) -> float:
    """How long a batch takes, one sequence for each adapter; prompts are new to the prefix cache."""
    from vllm import SamplingParams

    engine.reset_prefix_cache()
    prompts = [
        {"prompt_token_ids": list(range(100 + 7 * i, 100 + 7 * i + prompt))} for i in range(len(adapters))
    ]
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    engine.generate(prompts, sampling, lora_request=adapters, use_tqdm=False)
    return time.perf_counter() - start


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not (options.folder / "merged").exists():
        make(options.base, options.folder)

    from vllm import LLM
    from vllm.lora.request import LoRARequest

    common: dict[str, Any] = {
        "dtype": options.dtype,
        "max_model_len": 640,
        "max_num_seqs": 8,
        "enforce_eager": True,
    }
    merged = LLM(str(options.folder / "merged"), **common)
    engine = LLM(options.base, enable_lora=True, max_lora_rank=8, max_loras=8, max_cpu_loras=32, **common)
    numbers = {name: i + 1 for i, name in enumerate(sorted(path.name for path in options.folder.glob("*-?")))}
    requests = {name: LoRARequest(name, i, str(options.folder / name)) for name, i in numbers.items()}
    loading = []
    for name in ("smoa4-0", "smoa4-1", "smoa4-2"):
        start = time.perf_counter()
        engine.llm_engine.add_lora(requests[name])
        loading.append(time.perf_counter() - start)

    kinds = ("smoa4-", "smoa2-", "hira-", "lora-")
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
            decode = seconds(model, adapters, 8, TOKENS) - seconds(model, adapters, 8, 1)
            prefill = seconds(model, adapters[:1], PREFILL, 1)
            times[name].append((decode / (TOKENS - 1), prefill))
    kept = "W0 not kept" if os.environ.get("SMOA_VLLM_KEEP_W0") == "0" else "W0 kept"
    print(
        f"| {options.dtype}, {kept} | ms per output token | over merged | ms for {PREFILL} tokens | over merged |"
    )
    print("|---|---|---|---|---|")
    # The first round reads W0 and fills caches. Ratios are medians over rounds.
    for name in cases:
        rows = list(zip(times[name][1:], times["merged"][1:], strict=True))
        ms = [1e3 * statistics.median(own[i] for own, _ in rows) for i in (0, 1)]
        ratios = [statistics.median(own[i] / other[i] for own, other in rows) for i in (0, 1)]
        print(f"| {name} | {ms[0]:.1f} | {ratios[0]:.2f} | {ms[1]:.0f} | {ratios[1]:.2f} |")
    print(f"\nLoading smoa4-0, 1, 2: {', '.join(f'{one:.2f}' for one in loading)} s")


if __name__ == "__main__":
    main()
