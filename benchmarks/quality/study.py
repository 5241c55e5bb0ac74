"""One run, and the order of a slice's runs: first every learning rate on validation, then the best one on test."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import fmean, median_high
from typing import Any

import torch
import torch.nn.functional as F
from questions import Question, Splits
from torch import Tensor, nn
from training import schedule, shuffled

from . import data, store
from .four_bits import merge, quantize_layers
from .methods import BY_NAME, LADDER, Method, update_spectrum
from .models import CutModel
from .tasks import TASKS, Task

SEARCH_SEED = 1000  # differs from all reported seeds
EVALUATION_BATCH = 64
SMOKE_QUESTIONS = 40


def searched(records: Sequence[dict[str, Any]], task: str, method: str) -> list[dict[str, Any]]:
    """Return a method's runs on validation, by learning rate, or those of the method whose rate it takes."""
    name = BY_NAME[method].rate_of or method
    runs = [r for r in records if (r["task"], r["method"], r["stage"]) == (task, name, "search")]
    return sorted((r for r in runs if r["lr"] in LADDER), key=lambda r: r["lr"])


def best_rate(records: Sequence[dict[str, Any]], task: str, method: str) -> float | None:
    """Return the learning rate that did best on validation, by accuracy and then by loss; None before any was tried.

    For a method that takes another one's rate: that rate times the method's factor.
    """
    tried = searched(records, task, method)
    best = max(tried, key=lambda r: (r["accuracy"], -r["evaluation_loss"]), default=None)
    return None if best is None else BY_NAME[method].times * best["lr"]


def rate_beyond(tried: Collection[float], best: float, ladder: Sequence[float] = LADDER) -> float | None:
    """The next rate on the ladder beyond the best, if the best is the least or greatest tried; else None."""
    at = ladder.index(best)
    beyond = {min(tried): at - 1, max(tried): at + 1}.get(best, -1)
    return ladder[beyond] if 0 <= beyond < len(ladder) else None


class Slice:
    """All runs of one task.

    Args:
        task: the task.
        path: the records' file. Runs that are in it are not repeated.
        rates: learning rates to try. The search goes on along the ladder while the best is the least or the greatest.
        smoke: a few questions, and only the first rate.
    """

    def __init__(self, task: Task, path: Path, rates: Sequence[float], smoke: bool) -> None:
        self.task, self.path, self.smoke = task, path, smoke
        self.rates = rates[:1] if smoke else rates
        self.splits = data.prepare(task.read(), task.held_out)
        if smoke:
            self.splits = Splits(*(part[:SMOKE_QUESTIONS] for part in self.splits))
        self.digest = data.digest(self.splits)
        self.model = task.cut(data.answers(self.splits), task.layers)
        self.provenance = store.provenance()

    def run(self, seeds: int, methods: Sequence[Method]) -> None:
        """Do the missing runs, method by method."""
        for method in methods:
            self.search(method)
            for seed in range(seeds):
                self.final(method, seed)

    def search(self, method: Method) -> None:
        """Try every learning rate on validation, and further ones; none if nothing is trained."""
        if self._trains(method) and method.rate_of is None:
            for lr in self.rates:
                self._once(method, "search", lr, SEARCH_SEED, self.splits.validation)
            while not self.smoke and (beyond := self._next(method)) is not None:
                self._once(method, "search", beyond, SEARCH_SEED, self.splits.validation)

    def _next(self, method: Method) -> float | None:
        tried = searched(self._searches(method), self.task.name, method.name)
        return rate_beyond([r["lr"] for r in tried], best_rate(tried, self.task.name, method.name) or 0.0)

    def final(self, method: Method, seed: int) -> None:
        """Judge the best learning rate on test."""
        lr = best_rate(self._searches(method), self.task.name, method.name) if self._trains(method) else 0.0
        if lr is not None:
            self._once(method, "final", lr, seed, self.splits.test)

    def key(self, method: Method, stage: str, lr: float, seed: int) -> dict[str, Any]:
        """The fields that identify a run of this slice."""
        sized = method.sized(self.model.upper, self.model.targets)
        run = {"task": self.task.name, "method": sized.name, "stage": stage, "lr": lr, "seed": seed}
        fixed = {"dtype": "float32", "data": self.digest}
        return store.key_of(vars(self.task) | vars(sized) | fixed | run)

    def _searches(self, method: Method) -> list[dict[str, Any]]:
        """The records of the method's search, or of that whose rate it takes, with the present settings."""
        wanted = self.key(BY_NAME[method.rate_of] if method.rate_of else method, "search", 0.0, SEARCH_SEED)
        return [r for r in store.read(self.path) if store.key_of(r) | {"lr": 0.0} == wanted]

    def _trains(self, method: Method) -> bool:
        return method.kind != "none" or self.model.new_head

    def _once(self, method: Method, stage: str, lr: float, seed: int, judged_on: list[Question]) -> None:
        key = self.key(method, stage, lr, seed)
        if key in map(store.key_of, store.read(self.path)):
            return
        result = train_and_judge(self.model, method, self.task, lr, seed, self.splits.train, judged_on)
        store.append(self.path, key | result | self.provenance)
        print(
            f"{self.task.name}  {method.name:16} {stage:6} lr {lr:<6g} seed {seed:<4}"
            f" {result['accuracy']:6.1%}  loss {result['loss_end']:.3f}  {result['seconds']:.0f} s"
        )


def train_and_judge(
    cut: CutModel,
    method: Method,
    task: Task,
    lr: float,
    seed: int,
    train: Sequence[Question],
    judged_on: Sequence[Question],
) -> dict[str, Any]:
    """Adapt, train and judge, in four bits again after merging; a loss that is not finite ends the training, and the
    model is judged as it is."""
    begin = time.process_time()
    base = cut.fresh(seed)
    head = list(base.head.parameters()) if cut.new_head else []
    method = method.sized(base, cut.targets)
    layers = quantize_layers(base, cut.targets[method.modules], method.bits) if method.bits else {}
    model = cut.adapt(method, base, seed)
    adapter = [p for p in model.parameters() if p.requires_grad]
    for parameter in head:
        parameter.requires_grad_(True)
    # Without an adapter the searched rate is the head's; with one the head has the same rate for all methods.
    head_lr = lr if method.kind == "none" else task.head_lr
    groups = [{"params": p, "lr": rate} for p, rate in ((adapter, lr), (head, head_lr)) if p]
    losses: list[float] = []
    seconds: list[float] = []
    if groups:
        drawn = list(islice(shuffled(train, task.batch_size, seed), task.steps))
        for questions in drawn:
            cut.batch(questions)  # outside the timed steps
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        rates = schedule(optimizer, task.steps)
        for questions in drawn:
            start = time.process_time()
            batch = cut.batch(questions)
            loss = F.cross_entropy(model(batch.hidden, batch.layout), batch.labels)
            loss.backward()
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            seconds.append(time.process_time() - start)
            if not torch.isfinite(loss):
                break
    right, evaluation_loss = judge(cut, model, judged_on)
    result = {
        "right": right,
        "questions": len(judged_on),
        "accuracy": right / len(judged_on),
        "evaluation_loss": evaluation_loss,
        "loss_start": fmean(losses[:10] or [0.0]),
        "loss_end": fmean(losses[-10:] or [0.0]),
        "steps_done": len(losses),
        "worst_loss": max(losses[10:], default=0.0),
        "parameters": sum(p.numel() for p in adapter),
        "step_seconds": median_high(seconds or [0.0]),
        "seconds": time.process_time() - begin,
        **update_spectrum(model),
    }
    if layers:
        merge(model, layers, method.bits)
        right, result["merged_loss"] = judge(cut, model, judged_on)
        result |= {"merged_right": right, "merged_accuracy": right / len(judged_on)}
    return result


@torch.no_grad()
def judge(cut: CutModel, model: nn.Module, questions: Sequence[Question]) -> tuple[int, float]:
    """Return how many are answered right, and the mean loss."""
    right, total = 0, 0.0
    ordered = sorted(questions, key=lambda question: len(question.prompt))  # little padding
    for start in range(0, len(ordered), EVALUATION_BATCH):
        batch = cut.batch(ordered[start : start + EVALUATION_BATCH])
        scores: Tensor = model(batch.hidden, batch.layout)
        right += int((scores.argmax(-1) == batch.labels).sum())
        total += float(F.cross_entropy(scores, batch.labels, reduction="sum"))
    return right, total / len(questions)


def run_share(
    task: str, records: Path, smoke: bool, rates: Sequence[float], seeds: int, methods: Sequence[str]
) -> None:
    """Do some methods' runs of a task, on one thread. In this module: a spawned process cannot import `__main__`."""
    torch.set_num_threads(1)
    whole = replace(TASKS[task], steps=2, batch_size=4) if smoke else TASKS[task]
    Slice(whole, records, rates, smoke).run(seeds, [BY_NAME[method] for method in methods])
