"""How much of an adapter survives a merge to bf16, and a merge's memory and time: for benchmarks/results/scripts.md.

    make finetune                                             # SmolLM2-135M on TREC-6: runs/finetune-smoa
    python -m benchmarks.merged_model runs/finetune-smoa      # that folder, or its adapter's (10 min)

Rounding: the base is a bf16 copy. All models compute in float32, so they differ only in the stored weights. δ is the
rms of ΔW over that of W0, over all adapted weights; a smaller B makes it smaller.
Memory: each run has a fresh process, which first imports the modules that all of them need. The figure is VmHWM of
/proc/self/status at the end, less VmRSS at the start. The base is float32, in files of the size that is named.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import trec
from peft import PeftModel
from questions import Encoder, split
from safetensors.torch import load_file, save_file
from training import next_token_scores
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from smoa_kernels.peft import merge_to_folder, merged_weights

from .machine import commit, cpu_name, load
from .protocol import Turns
from .tables import shown, table

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SCALES = [1, 1 / 10, 1 / 50, 1 / 200]  # of B
ROUNDINGS = ("thresholds", "nearest")
ON_LOSS, BATCH = 48, 16  # whole batches of questions, from the first of the test split
WAYS = list(product(("merge_to_folder", "PEFT"), ("5GB", "60MB")))  # tools; the size of a file
RUNS = 3


def update(base: Path, adapter: Path) -> tuple[float, dict[str, float]]:
    """δ, and for each rounding the rms error of the stored ΔW relative to ΔW."""
    before = load_file(base / "model.safetensors")
    exact = merged_weights(base, adapter, dtype=torch.float32)
    weights, change, errors = 0.0, 0.0, dict.fromkeys(ROUNDINGS, 0.0)
    for (name, W_eff), (_, stored) in zip(exact, merged_weights(base, adapter), strict=True):
        W0 = before[name].float()
        if not torch.equal(W_eff, W0):  # an adapted weight
            weights += float(W0.square().sum())
            change += float((W_eff - W0).square().sum())
            for way, tensor in zip(ROUNDINGS, (stored, W_eff.bfloat16()), strict=True):
                errors[way] += float((tensor.float() - W_eff).square().sum())
    return math.sqrt(change / weights), {way: math.sqrt(error / change) for way, error in errors.items()}


def loaded(folder: Path) -> Any:
    """A model that computes in float32, with the weights as they are stored."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def rounding(original: Path, trained: Path, scratch: Path) -> None:
    """Print the share that survives each rounding, by δ."""
    base, adapter, merged = (scratch / name for name in ("base", "adapter", "merged"))
    AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16).save_pretrained(base)
    questions, longest = (
        trec.read(trec.locate()),
        AutoConfig.from_pretrained(original).max_position_embeddings,
    )
    encoder = Encoder(AutoTokenizer.from_pretrained(original), {one.answer for one in questions}, longest)
    test = split(questions).test

    @torch.no_grad()
    def loss(model: Any) -> float:
        """Mean cross-entropy of the answers' first tokens, as in training."""
        total = 0.0
        for start in range(0, ON_LOSS, BATCH):
            batch = encoder.batch(test[start : start + BATCH])
            scores = next_token_scores(model.eval(), batch.input_ids, batch.attention_mask)
            total += float(F.cross_entropy(scores, batch.targets, reduction="sum"))
        return total / ON_LOSS

    without = loss(loaded(base))
    rows = [["δ"], [f"loss ({without:.3f} without the adapter)"], *([f"kept, {way}"] for way in ROUNDINGS)]
    for scale in SCALES:
        shutil.copytree(trained, adapter, dirs_exist_ok=True)
        tensors = load_file(trained / TENSORS)
        scaled = {name: scale * t if name.endswith(".B") else t for name, t in tensors.items()}
        save_file(scaled, adapter / TENSORS)
        model = PeftModel.from_pretrained(loaded(base), str(adapter))
        delta, errors = update(base, adapter)
        whole = loss(model)
        cells = [f"{delta:.1e}", f"{whole:.3f}"]
        for way in ROUNDINGS:
            nearest = way == "nearest"  # the float32 merge, rounded here
            merge_to_folder(base, adapter, merged, dtype=torch.float32 if nearest else None)
            model = loaded(merged)
            kept = (without - loss(model.bfloat16().float() if nearest else model)) / (without - whole)
            shutil.rmtree(merged)
            print(f"δ = {delta:.1e}, {way}: error of the stored ΔW {100 * errors[way]:.1f} %", flush=True)
            cells.append(f"{kept:.3f}")
        for row, cell in zip(rows, cells, strict=True):
            row.append(cell)
    print("\n" + table(rows[0], rows[1:]))


def resident(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def merge(tool: str, most: str, base: Path, adapter: Path, out: Path) -> tuple[float, float, list[float]]:
    """Merge in this process: GB that its resident set grew by, seconds of processor time, GB of each file."""
    torch.set_num_threads(1)
    with torch.device("meta"):  # imports the model's code
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, began = resident("VmRSS"), time.process_time()
    if tool == "PEFT":
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
        model.merge_and_unload().save_pretrained(out, max_shard_size=most)
    else:
        merge_to_folder(base, adapter, out)
    seconds, grown = time.process_time() - began, resident("VmHWM") - before
    return grown / 1e9, seconds, [file.stat().st_size / 1e9 for file in out.glob("*.safetensors")]


def memory(base: Path, adapter: Path, out: Path) -> None:
    """Print memory and time of each way to merge; the ways take turns."""
    files: dict[str, list[float]] = {}
    bases = {most: out.with_name(f"base-{most}") for _, most in WAYS}
    for most, folder in bases.items():
        AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder, max_shard_size=most)

    def run(name: str, tool: str, most: str) -> dict[str, float]:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            grown, seconds, files[name] = fresh.submit(merge, tool, most, bases[most], adapter, out).result()
        shutil.rmtree(out)
        return {"resident set grew by, GB": grown, "processor time, s": seconds}

    ways = {" ".join(way): way for way in WAYS}
    turns = Turns({name: partial(run, name, *way) for name, way in ways.items()}, next(iter(ways)))
    for _ in range(RUNS):
        turns.round()
    found = turns.comparisons()
    rows = []
    for name, (tool, _) in ways.items():
        cells = (shown(each.time(name)) for each in found.values())
        rows.append((tool, f"{len(files[name])}, largest {max(files[name]):.2f}", *cells))
    print(table(("", "files, GB", *found), rows), flush=True)


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="of a run of make finetune, or of its adapter")
    folder = parser.parse_args().folder
    adapter = folder / "adapter" if (folder / "adapter").is_dir() else folder
    base = Path(json.loads((adapter / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"])
    torch.set_num_threads(1)
    print(f"{cpu_name()}, 1 thread, commit {commit()}, {load():.0f} processes running or waiting\n")
    with tempfile.TemporaryDirectory() as scratch:
        memory(base, adapter, Path(scratch, "merged"))
        rounding(base, adapter, Path(scratch))


if __name__ == "__main__":
    main()
