"""What fine-tuning costs the model: accuracy on its task beside nats a token on general text, over learning rates.

The job is that of `examples/finetune.py`: TREC-6, all 30 layers of SmolLM2-135M, 60 steps, float32.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import smollm2
import torch
import torch.nn.functional as F
from questions import Encoder, Question, Splits, split
from torch import Tensor, nn
from training import LARGEST_NORM, schedule, shuffled
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import data, general, store
from .methods import BY_NAME, Method
from .models import LONGEST
from .tasks import TASKS

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
TASK = replace(TASKS["trec6"], name="trec6-whole", layers=TASKS["trec6"].of_layers)
LORA, LORA_HALF, HIRA = (BY_NAME[name] for name in ("LoRA", "LoRA, r=4", "HiRA"))
SMOA = replace(BY_NAME["SMoA K=2, r=8, LoRA's rate"], name="SMoA K=2, use_lora_rate", rate_of=None)
# In this order, seed by seed, so that what has been run can be compared at any time.
RATES = {
    LORA: (1e-3, 2e-3, 3e-3, 5e-3),
    SMOA: (2e-3, 3e-3, 5e-3, 8e-3),
    LORA_HALF: (2e-3, 3e-3, 5e-3, 8e-3),
    HIRA: (5e-3, 1e-2, 1.5e-2, 2e-2),
}
LEADING = 32  # singular vectors of W0 on either side
TOGETHER = 20  # test questions
SMOKE_QUESTIONS, SMOKE_STEPS, SMOKE_WINDOWS = 8, 2, 1


class Weight(NamedTuple):
    """A linear layer's weight before training, its largest singular value and its first singular vectors, as columns."""

    value: Tensor
    norm: Tensor
    left: Tensor
    right: Tensor


class Forgetting:
    """The runs of both numbers.

    Args:
        records: their file. Runs that are in it are not repeated.
        smoke: a few questions, steps and words.
    """

    def __init__(self, records: Path, smoke: bool) -> None:
        self.records, self.smoke = records, smoke
        self.folder = smollm2.cached_model()
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        questions = TASK.read()
        self.encoder = Encoder(tokenizer, {question.answer for question in questions}, LONGEST)
        self.splits = split(questions)
        self.tokens = general.windows(tokenizer)
        self.task = TASK
        if smoke:
            self.task = replace(TASK, steps=SMOKE_STEPS)
            self.splits = Splits(*(part[:SMOKE_QUESTIONS] for part in self.splits))
            self.tokens = {kind: rows[:SMOKE_WINDOWS] for kind, rows in self.tokens.items()}
        self.digest = f"{data.digest(self.splits)} {general.digest(self.tokens)}"
        self.provenance = store.provenance()

    def run(self, seeds: Sequence[int], methods: Sequence[Method], rates: Sequence[float] = ()) -> None:
        """Do the missing runs, seed by seed; of all of each method's learning rates if none are given."""
        for seed in seeds:
            for method in methods:
                for lr in RATES[method]:
                    if not rates or lr in rates:
                        self.once(method, lr, seed)

    def once(self, method: Method, lr: float, seed: int) -> None:
        """Do a run that is not in the records."""
        named = {"task": self.task.name, "method": method.name, "stage": "front", "lr": lr, "seed": seed}
        key = store.key_of(vars(self.task) | vars(method) | {"dtype": "float32", "data": self.digest} | named)
        if key not in map(store.key_of, store.read(self.records)):
            result = self.measure(method, lr, seed)
            store.append(self.records, key | result | self.provenance)
            print(
                f"{method.name:24} lr {lr:<6g} seed {seed} {result['accuracy']:6.1%}"
                f"  {result['nats_more']:+.3f} nats  {result['seconds']:.0f} s",
                flush=True,
            )

    def measure(self, method: Method, lr: float, seed: int) -> dict[str, Any]:
        """Train, merge, answer the test questions and read the general text."""
        begin = time.process_time()
        torch.manual_seed(seed)
        model: Any = method.adapt(self.load(), {"target_modules": list(TARGETS)}, seed)
        losses = self.train(model, lr, seed)
        trained = time.process_time()
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        model = model.merge_and_unload()
        right = self.right(model)
        answered = time.process_time()
        found = self.update(model)
        windows, states = self.read(model)
        before, states_before = self.base
        more = torch.cat([windows[kind] - before[kind] for kind in windows])
        return {
            "right": right,
            "questions": len(self.splits.test),
            "accuracy": right / len(self.splits.test),
            "nats_before": {kind: float(rows.mean()) for kind, rows in before.items()},
            "nats": {kind: float(rows.mean()) for kind, rows in windows.items()},
            "nats_more": float(more.mean()),
            "nats_error": float(more.std() / len(more) ** 0.5),
            "loss_start": fmean(losses[:10]),
            "loss_end": fmean(losses[-10:]),
            "parameters": parameters,
            **found,
            "states": [round(relative(a, b), 5) for a, b in zip(states, states_before, strict=True)],
            "seconds": time.process_time() - begin,
            "seconds_trained": trained - begin,
            "seconds_answered": answered - trained,
        }

    def scores(self, model: nn.Module, questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
        """The scores (questions, vocabulary) of the token after each prompt, and the right one, (questions,).

        The prompts lie in one row: without padding a step takes 0.6 of the time.
        """
        rows = self.encoder.tokenizer([question.prompt for question in questions]).input_ids
        lengths = torch.tensor([len(row) for row in rows])
        inputs = {
            "input_ids": torch.tensor([list(chain(*rows))]),
            "position_ids": torch.tensor([list(chain(*map(range, lengths.tolist())))]),
            "logits_to_keep": lengths.cumsum(0) - 1,
        }
        answers = [self.encoder.answers.index(question.answer) for question in questions]
        return model(**inputs, use_cache=False).logits[0], self.encoder.answer_tokens[answers]

    def train(self, model: nn.Module, lr: float, seed: int) -> list[float]:
        """Train as the example does; return the losses."""
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
        rates = schedule(optimizer, self.task.steps)
        losses = []
        model.train()
        for questions in islice(shuffled(self.splits.train, self.task.batch_size, seed), self.task.steps):
            loss = F.cross_entropy(*self.scores(model, questions))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, LARGEST_NORM)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    @torch.no_grad()
    def right(self, model: nn.Module) -> int:
        """How many test questions are answered right."""
        model.eval()
        right = 0
        for start in range(0, len(self.splits.test), TOGETHER):
            scores, wanted = self.scores(model, self.splits.test[start : start + TOGETHER])
            chosen = scores[:, self.encoder.answer_tokens].argmax(-1)
            right += int((self.encoder.answer_tokens[chosen] == wanted).sum())
        return right

    def load(self) -> nn.Module:
        """The base model, fresh."""
        model: nn.Module = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        return model

    def read(self, model: nn.Module) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Nats of each window by kind of text, and each layer's hidden states of the first windows.

        In bfloat16, which takes 0.6 of float32's time; mean nats of the base differ by 0.0006 from float32's.
        """
        model.to(torch.bfloat16).eval()
        with torch.no_grad():
            first = torch.stack([rows[0] for rows in self.tokens.values()])
            states = model(input_ids=first, use_cache=False, output_hidden_states=True, logits_to_keep=1)
        found = {kind: general.nats(model, rows) for kind, rows in self.tokens.items()}
        return found, [state.float() for state in states.hidden_states]

    @cached_property
    def base(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        """What `read` finds before training."""
        return self.read(self.load())

    @cached_property
    def weights(self) -> dict[str, Weight]:
        """The adapted layers' weights before training."""
        found = {}
        for name, layer in self.load().named_modules():
            if name.endswith(TARGETS):
                weight = layer.get_parameter("weight").detach()
                left, values, right = torch.linalg.svd(weight, full_matrices=False)
                found[name] = Weight(weight, values[0], left[:, :LEADING].clone(), right[:LEADING].mT.clone())
        return found

    @torch.no_grad()
    def update(self, model: nn.Module) -> dict[str, Any]:
        """What training changed: the update's size relative to W0, and where it lies.

        "delta" has the ratio of Frobenius norms by decoder layer, "peak" the mean ratio of spectral norms. "leading" has
        the mean shares of the update's energy in the span of W0's first singular vectors: of the outputs, of the
        inputs, of both.
        """
        layers: dict[str, list[tuple[float, float]]] = {}
        peaks, shares = [], []
        for name, (weight, norm, left, right) in self.weights.items():
            change = model.get_submodule(name).get_parameter("weight") - weight
            size = float(change.square().sum())
            layers.setdefault(name.split(".")[2], []).append((size, float(weight.square().sum())))
            peaks.append(float(spectral_norm(change) / norm))
            along = left.mT @ change
            shares.append(
                [float(part.square().sum()) / size for part in (along, change @ right, along @ right)]
            )
        sums = [[sum(part) for part in zip(*pairs, strict=True)] for pairs in layers.values()]
        return {
            "delta": [round((ours / base) ** 0.5, 6) for ours, base in sums],
            "peak": fmean(peaks),
            "leading": [fmean(share) for share in zip(*shares, strict=True)],
        }


def relative(after: Tensor, before: Tensor) -> float:
    """The norm of a change over the norm of what was changed, mean over tokens."""
    return float(((after - before).norm(dim=-1) / before.norm(dim=-1)).mean())


def spectral_norm(matrix: Tensor, steps: int = 30) -> Tensor:
    """The largest singular value, by power iteration, to within a few percent below."""
    vector = torch.ones(matrix.shape[1]) / matrix.shape[1] ** 0.5
    for _ in range(steps):
        vector = matrix.mT @ (matrix @ vector)
        vector = vector / vector.norm()
    return (matrix @ vector).norm()
