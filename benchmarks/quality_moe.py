"""A small quality slice on experts: LoRA and SMoA on the tiny Qwen3-MoE of `examples/finetune_moe.py`.

    make quality-moe      # every run that is missing, then the table

The methods that adapt experts train equally many parameters. Each searches its learning rate on validation, with a seed
that is not reported. The search goes on along `LADDER` while the best rate is the least or the greatest tried.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import finetune_moe
import torch
import trec
from peft import LoraConfig, get_peft_model
from questions import Question, split
from torch import nn
from training import schedule
from transformers import Qwen3MoeForSequenceClassification

from smoa_kernels.peft import SMoAConfig

from .machine import EDITED, commit
from .quality import store
from .quality.analysis import differences, mean_of
from .quality.study import SEARCH_SEED, rate_beyond
from .readme import with_section
from .results import RESULTS, write
from .tables import table

RECORDS = RESULTS / "quality_moe.jsonl"
PAGE = RESULTS / "scripts.md"
START = "<!-- written by make quality-moe: -->"
STEPS, BATCH, HEAD_RATE = 200, 32, 1e-2
SEEDS = 5
LADDER = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
FIRST = LADDER[2:5]

_COMMON: dict[str, Any] = {
    "target_modules": [],
    "target_parameters": finetune_moe.TARGETS,
    "task_type": "SEQ_CLS",
}
LORA, HEAD = "LoRA, r=8", "the head alone"
METHODS: dict[str, Any] = {HEAD: None, LORA: LoraConfig(r=8, lora_alpha=8, **_COMMON)}
for _order in ("contiguous", "spectral"):
    METHODS[f"SMoA {_order}, K=4, r=32"] = SMoAConfig(r=32, num_blocks=4, block_order=_order, **_COMMON)


def main() -> None:
    """Do the runs that are not in the records yet, then write the table."""
    for name in METHODS:
        rate = search(name)
        for seed in range(SEEDS):
            run(name, "final", rate, seed)
    write(PAGE, with_section(PAGE.read_text(encoding="utf-8"), page(store.read(RECORDS)), START))


def search(name: str) -> float:
    """The rate that does best on validation; the head's own if only the head is trained."""
    if METHODS[name] is None:
        return HEAD_RATE
    tried = {rate: run(name, "search", rate, SEARCH_SEED) for rate in FIRST}
    while True:
        best = max(tried, key=lambda rate: (tried[rate]["accuracy"], -tried[rate]["loss"]))
        if (beyond := rate_beyond(tried, best, LADDER)) is None:
            return best
        tried[beyond] = run(name, "search", beyond, SEARCH_SEED)


def run(name: str, stage: str, rate: float, seed: int) -> dict[str, Any]:
    """Train and judge once, on validation to search and on test in the end; recorded runs are not repeated."""
    key = {"method": name, "stage": stage, "lr": rate, "seed": seed, "steps": STEPS, "batch_size": BATCH}
    for record in store.read(RECORDS):
        if key.items() <= record.items():
            return record
    splits = split(trec.read(trec.locate()))
    words = finetune_moe.vocabulary(splits.train)
    model, trained = adapted(name, len(words) + 2, seed)
    loss = train(model, finetune_moe.encode(words, splits.train), rate, seed)
    judged: list[Question] = splits.validation if stage == "search" else splits.test
    score = finetune_moe.accuracy(model, finetune_moe.encode(words, judged))
    result = {"accuracy": score.accuracy, "loss": loss, "parameters": trained, **store.provenance()}
    store.append(RECORDS, key | result)
    print(f"{name}, {stage}, rate {rate:g}, seed {seed}: {score}", flush=True)
    return key | result


def adapted(name: str, vocabulary: int, seed: int) -> tuple[nn.Module, int]:
    """The model, whose base is the same for every seed, and how many parameters its experts' adapter trains."""
    torch.manual_seed(0)
    model = Qwen3MoeForSequenceClassification(finetune_moe.model_config(vocabulary))
    torch.manual_seed(seed)
    if METHODS[name] is None:
        model.requires_grad_(False).score.requires_grad_(True)
        return model, 0
    model = get_peft_model(model, METHODS[name])
    return model, sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and ".experts." in n)


def train(model: nn.Module, encoded: list[dict[str, Any]], rate: float, seed: int) -> float:
    """Train the adapter at `rate` and the head at `HEAD_RATE`; returns the mean loss of the last tenth of the steps."""
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head, adapter = (
        [p for name, p in parameters if ("score." in name) is of_head] for of_head in (True, False)
    )
    groups = [{"params": group, "lr": lr} for group, lr in ((head, HEAD_RATE), (adapter, rate)) if group]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    scheduler, losses = schedule(optimizer, STEPS), []
    order = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(STEPS):
        chosen = torch.randint(len(encoded), (BATCH,), generator=order).tolist()
        batch = {field: torch.tensor([encoded[i][field] for i in chosen]) for field in encoded[0]}
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return fmean(losses[-STEPS // 10 :])


def finals(records: list[dict[str, Any]], name: str) -> dict[int, float]:
    """Accuracy on test in per cent, by seed."""
    return {r["seed"]: 100 * r["accuracy"] for r in records if (r["method"], r["stage"]) == (name, "final")}


def page(records: list[dict[str, Any]]) -> str:
    """The table of benchmarks/results/scripts.md."""
    lora, rows = finals(records, LORA), []
    for name in METHODS:
        run = next(r for r in records if (r["method"], r["stage"]) == (name, "final"))
        own = finals(records, name)
        mean, beside = mean_of(list(own.values())), mean_of(differences(own, lora))
        minus = "–" if name == LORA else f"{beside.value:+.1f} [{beside.low:+.1f}, {beside.high:+.1f}]"
        figures = f"{run['parameters']:,}", f"{run['lr']:g}", f"{mean.value:.1f} ± {mean.half_width:.1f}"
        rows.append((name, *figures, minus))
    commits = sorted({r["commit"] for r in records})
    headings = ("", "parameters of experts", "learning rate", "right on test, %", f"beside {LORA}, by seed")
    return (
        f"{table(headings, rows)}\n*Measured on {records[0]['machine']['device']}, one thread, commit "
        f"{', '.join(commits)}: {SEEDS} seeds, means with 95 % intervals of Student's t.*"
    )


if __name__ == "__main__":
    if commit().endswith(EDITED):
        raise SystemExit("code is not committed, so nobody could repeat these runs: commit it")
    main()
