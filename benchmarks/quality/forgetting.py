"""What fine-tuning costs the model: accuracy on its task beside nats a token on general text, over learning rates.

The job is that of `examples/finetune.py`: TREC-6, all 30 layers of SmolLM2-135M, 60 steps, float32.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import smollm2
import torch
import torch.nn.functional as F
from questions import Encoder, Question, Splits, split
from torch import Tensor, nn
from training import LARGEST_NORM, schedule, shuffled
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import data, store
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
WINDOWS, LENGTH = 13, 256  # of each kind of text; tokens, all but the first of a window are predicted
LEADING = 32  # singular vectors of W0 on either side
TOGETHER = 20  # test questions
SMOKE = 8  # questions


class Forgetting:
    """The runs of both numbers.

    Args:
        records: their file. Runs that are in it are not repeated.
        smoke: two steps, a few questions and words.
    """

    def __init__(self, records: Path, smoke: bool) -> None:
        self.records, self.folder = records, smollm2.cached_model()
        self.task = replace(TASK, steps=2) if smoke else TASK
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.splits = split(TASK.read())
        self.encoder = Encoder(tokenizer, {question.answer for question in self.splits.train}, LONGEST)
        rows = {kind: tokenizer(text).input_ids[: WINDOWS * LENGTH] for kind, text in data.general().items()}
        self.tokens = {kind: torch.tensor(row).view(WINDOWS, LENGTH) for kind, row in rows.items()}
        if smoke:
            self.splits = Splits(*(part[:SMOKE] for part in self.splits))
            self.tokens = {kind: rows[:1] for kind, rows in self.tokens.items()}
        read = str([tokens.tolist() for tokens in self.tokens.values()]).encode()
        self.digest = f"{data.digest(self.splits)} {hashlib.sha256(read).hexdigest()[:12]}"
        self.provenance = store.provenance()

    def run(self, seeds: Sequence[int], methods: int, rates: Sequence[float] = ()) -> None:
        """Do the runs of the first methods that are missing; at all of their learning rates if none are given."""
        for seed in seeds:
            for method in list(RATES)[:methods]:
                for lr in RATES[method]:
                    if not rates or lr in rates:
                        self.once(method, lr, seed)

    def once(self, method: Method, lr: float, seed: int) -> None:
        """Do a run that is not in the records."""
        run = {"method": method.name, "stage": "front", "lr": lr, "seed": seed, "task": self.task.name}
        key = store.key_of(vars(self.task) | vars(method) | {"dtype": "float32", "data": self.digest} | run)
        if key not in map(store.key_of, store.read(self.records)):
            result = self.measure(method, lr, seed)
            store.append(self.records, key | result | self.provenance)
            both = f"{result['accuracy']:6.1%}  {result['nats_more']:+.3f} nats  {result['seconds']:.0f} s"
            print(f"{method.name:24} lr {lr:<6g} seed {seed} {both}", flush=True)

    def measure(self, method: Method, lr: float, seed: int) -> dict[str, Any]:
        """Train, merge, answer the test questions and read the general text."""
        before, states_before, _ = self.base
        begin = time.process_time()
        torch.manual_seed(seed)
        model: Any = method.adapt(self.load(), {"target_modules": list(TARGETS)}, seed)
        self.train(model, lr, seed)
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        model = model.merge_and_unload().eval()
        right, update = self.right(model), self.update(model)
        after, states = self.read(model)
        more = torch.cat([after[kind] - before[kind] for kind in after])
        moved = [(a - b).norm(dim=-1) / b.norm(dim=-1) for a, b in zip(states, states_before, strict=True)]
        return {
            "right": right,
            "questions": len(self.splits.test),
            "accuracy": right / len(self.splits.test),
            "nats_before": {kind: float(rows.mean()) for kind, rows in before.items()},
            "nats": {kind: float(rows.mean()) for kind, rows in after.items()},
            "nats_more": float(more.mean()),
            "nats_error": float(more.std() / len(more) ** 0.5),
            "parameters": parameters,
            **update,
            "states": [round(float(each.mean()), 5) for each in moved],
            "seconds": time.process_time() - begin,
        }

    def load(self) -> nn.Module:
        """The base model, fresh."""
        model: nn.Module = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        return model

    def scores(self, model: nn.Module, questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
        """The scores (questions, vocabulary) of the token after each prompt, and the right one, (questions,).

        All prompts lie in one row: without padding a step takes 0.6 of the time.
        """
        rows = self.encoder.tokenizer([question.prompt for question in questions]).input_ids
        lengths = [len(row) for row in rows]
        inputs = {
            "input_ids": torch.tensor([list(chain(*rows))]),
            "position_ids": torch.tensor([list(chain(*map(range, lengths)))]),
            "logits_to_keep": torch.tensor(lengths).cumsum(0) - 1,
        }
        answers = [self.encoder.answers.index(question.answer) for question in questions]
        return model(**inputs, use_cache=False).logits[0], self.encoder.answer_tokens[answers]

    def train(self, model: nn.Module, lr: float, seed: int) -> None:
        """Train as the example does."""
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
        rates = schedule(optimizer, self.task.steps)
        model.train()
        for questions in islice(shuffled(self.splits.train, self.task.batch_size, seed), self.task.steps):
            F.cross_entropy(*self.scores(model, questions)).backward()
            torch.nn.utils.clip_grad_norm_(trained, LARGEST_NORM)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def right(self, model: nn.Module) -> int:
        """How many test questions are answered right."""
        right, answers = 0, self.encoder.answer_tokens
        for start in range(0, len(self.splits.test), TOGETHER):
            scores, wanted = self.scores(model, self.splits.test[start : start + TOGETHER])
            right += int((answers[scores[:, answers].argmax(-1)] == wanted).sum())
        return right

    @torch.no_grad()
    def read(self, model: nn.Module) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Nats a token of each window by kind of text, and each layer's hidden states of the first windows.

        In bfloat16, in 0.6 of float32's time.
        """
        model.to(torch.bfloat16)
        first = torch.stack([rows[0] for rows in self.tokens.values()])
        states = model(
            input_ids=first, use_cache=False, output_hidden_states=True, logits_to_keep=1
        ).hidden_states
        nats: dict[str, list[Tensor]] = {}
        for kind, rows in self.tokens.items():
            for row in rows[:, None]:
                scores = model(input_ids=row, use_cache=False).logits[0, :-1].float()
                nats.setdefault(kind, []).append(F.cross_entropy(scores, row[0, 1:]))
        return {kind: torch.stack(each) for kind, each in nats.items()}, [state.float() for state in states]

    @cached_property
    def base(self) -> tuple[dict[str, Tensor], list[Tensor], dict[str, list[Tensor]]]:
        """What `read` finds before training, and each adapted layer's W0 with its singular vectors and values."""
        model = self.load().eval()
        layers = [(name, layer) for name, layer in model.named_modules() if name.endswith(TARGETS)]
        weights = {name: layer.get_parameter("weight").detach() for name, layer in layers}
        parts = {name: [w, *torch.linalg.svd(w, full_matrices=False)] for name, w in weights.items()}
        return *self.read(model), parts

    @torch.no_grad()
    def update(self, model: nn.Module) -> dict[str, list[float]]:
        """What training changed, by decoder layer, means over its matrices.

        "delta" and "peak" are the ratios of the update's Frobenius and spectral norm to W0's, "outputs", "inputs" and
        "both" the shares of its energy in the span of W0's first left, right, and left and right singular vectors.
        """
        found = []
        for name, (weight, left, values, right) in self.base[-1].items():
            change = model.get_submodule(name).get_parameter("weight") - weight
            along, right = left[:, :LEADING].mT @ change, right[:LEADING].mT
            shares = [(part.norm() / change.norm()) ** 2 for part in (along, change @ right, along @ right)]
            peak = torch.svd_lowrank(change, niter=4)[1][0] / values[0]
            found.append(torch.stack([change.norm() / weight.norm(), peak, *shares]))
        means = torch.stack(found).unflatten(0, (self.task.layers, -1)).mean(1)
        rounded = [[round(value, 6) for value in column] for column in means.mT.tolist()]
        return dict(zip(("delta", "peak", "outputs", "inputs", "both"), rounded, strict=True))
