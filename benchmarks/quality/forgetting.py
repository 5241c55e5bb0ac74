"""What fine-tuning costs the model: how well it does its task beside nats a token on general text, over learning rates.

The first job is that of `examples/finetune.py`: TREC-6, all 30 layers of SmolLM2-135M, 60 steps, float32. The others
are the same but for their data: answering chats, as `examples/sft.py` does, and opinions after TREC-6.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

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
from .tasks import TASKS, Task

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
TREC = replace(TASKS["trec6"], name="trec6-whole", layers=TASKS["trec6"].of_layers)
OPINIONS = replace(TREC, name="opinions-whole", read=data.asked_opinions)
CHATS = replace(TREC, name="chats", read=data.chats_as_questions, batch_size=8, held_out=6)
JOBS = {
    "trec6-whole": (TREC,),
    "chats": (CHATS,),
    "trec6-opinions": (TREC, OPINIONS),
}  # trained on in this order

LORA, LORA_HALF, HIRA = (BY_NAME[name] for name in ("LoRA", "LoRA, r=4", "HiRA"))
SMOA = replace(BY_NAME["SMoA K=2, r=8, LoRA's rate"], name="SMoA K=2, use_lora_rate", rate_of=None)
RANDOM = replace(SMOA, name="random K=2, use_lora_rate", random=True)
CONTIGUOUS = replace(
    BY_NAME["contiguous K=4, LoRA's rate"], name="contiguous K=4, use_lora_rate", rate_of=None
)
DROPOUT = replace(LORA, name="LoRA, dropout 0.1", dropout=0.1)
# Without a gradient it would take 0.6 of an update at LoRA's rate; a usual 0.01 takes 0.003.
DECAY = replace(LORA, name="LoRA, weight decay 3", weight_decay=3.0)
# In this order, seed by seed, so that what has been run can be compared at any time.
FRONTS: dict[Method, tuple[float, ...]] = {
    LORA: (1e-3, 2e-3, 3e-3, 5e-3),
    SMOA: (2e-3, 3e-3, 5e-3, 8e-3),
    LORA_HALF: (2e-3, 3e-3, 5e-3, 8e-3),
    HIRA: (5e-3, 1e-2, 1.5e-2, 2e-2),
}
RATES: dict[str, dict[Method, tuple[float, ...]]] = {
    "trec6-whole": FRONTS
    | {
        CONTIGUOUS: (2e-3, 3e-3, 5e-3),
        RANDOM: (2e-3, 3e-3, 5e-3),
        DECAY: (2e-3, 3e-3, 5e-3),
        DROPOUT: (2e-3, 3e-3, 5e-3),
    },
    "chats": {
        LORA: (2e-3, 3e-3, 5e-3, 1e-2),
        SMOA: (3e-3, 5e-3, 8e-3, 1.5e-2),
        LORA_HALF: (3e-3, 5e-3, 8e-3, 1.5e-2),
        HIRA: (5e-3, 1e-2, 2e-2, 4e-2),
    },
    "trec6-opinions": {LORA: (2e-3, 3e-3, 5e-3), SMOA: (3e-3, 5e-3, 8e-3), LORA_HALF: (3e-3, 5e-3, 8e-3)},
}
SEEDS = {"trec6-whole": 5, "chats": 5, "trec6-opinions": 3}
WINDOWS, LENGTH = 13, 256  # of each kind of text; tokens, all but the first of a window are predicted
LEADING = 32  # singular vectors of W0 on either side
TOGETHER = 20  # test questions
SMOKE = 8  # questions


class Row(NamedTuple):
    """The tokens of a question and of its answer, the first alone where the answer is one of a few."""

    prompt: list[int]
    answer: list[int]


class Rows(NamedTuple):
    """A task's questions, and the first tokens of the answers among which the model chooses; none if it writes them."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    choices: Tensor


class Forgetting:
    """The runs of both numbers.

    Args:
        records: their file. Runs that are in it are not repeated.
        job: one of `JOBS`.
        smoke: two steps, a few questions and words.
    """

    def __init__(self, records: Path, job: str, smoke: bool) -> None:
        self.records, self.job, self.folder = records, job, smollm2.cached_model()
        self.tasks = [replace(task, steps=2) if smoke else task for task in JOBS[job]]
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        texts = {kind: tokenizer(text).input_ids[: WINDOWS * LENGTH] for kind, text in data.general().items()}
        self.tokens = {kind: torch.tensor(row).view(WINDOWS, LENGTH) for kind, row in texts.items()}
        splits = [split(task.read(), task.held_out) for task in self.tasks]
        if smoke:
            splits = [Splits(*(part[:SMOKE] for part in each)) for each in splits]
            self.tokens = {kind: rows[:1] for kind, rows in self.tokens.items()}
        self.rows = [
            rows_of(tokenizer, each, task is CHATS) for each, task in zip(splits, JOBS[job], strict=True)
        ]
        read = str([tokens.tolist() for tokens in self.tokens.values()]).encode()
        self.digest = " ".join([*map(data.digest, splits), hashlib.sha256(read).hexdigest()[:12]])
        self.provenance = store.provenance()

    def run(self, seeds: Sequence[int], methods: int, rates: Sequence[float] = ()) -> None:
        """Do the runs of the first methods that are missing; at all of their learning rates if none are given."""
        for seed in seeds:
            for method, of_method in list(RATES[self.job].items())[:methods]:
                for lr in of_method:
                    if not rates or lr in rates:
                        self.once(method, lr, seed)

    def once(self, method: Method, lr: float, seed: int) -> None:
        """Do a run that is not in the records."""
        run = {"method": method.name, "stage": "front", "lr": lr, "seed": seed, "task": self.job}
        settings = vars(self.tasks[-1]) | vars(method) | {"dtype": "float32", "data": self.digest}
        key = store.key_of(settings | run)
        if key not in map(store.key_of, store.read(self.records)):
            result = self.measure(method, lr, seed)
            store.append(self.records, key | result | self.provenance)
            scores = " ".join(f"{name} {result[name]:.3f}" for name in ("accuracy", "loss") if name in result)
            both = f"{scores}  {result['nats_more']:+.3f} nats  {result['seconds']:.0f} s"
            print(f"{self.job} {method.name:24} lr {lr:<6g} seed {seed} {both}", flush=True)

    def measure(self, method: Method, lr: float, seed: int) -> dict[str, Any]:
        """Train, merge, answer the test questions and read the general text."""
        before, states_before, _ = self.base
        begin = time.process_time()
        torch.manual_seed(seed)
        model: Any = method.adapt(self.load(), {"target_modules": list(TARGETS)}, seed)
        for task, rows in zip(self.tasks, self.rows, strict=True):
            self.train(model, task, rows, method.weight_decay, lr, seed)
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        model = model.merge_and_unload().eval()
        *earlier, scores = (score(model, rows) for rows in self.rows)
        update = self.update(model)
        after, states = self.read(model)
        more = torch.cat([after[kind] - before[kind] for kind in after])
        moved = [(a - b).norm(dim=-1) / b.norm(dim=-1) for a, b in zip(states, states_before, strict=True)]
        return {
            **scores,
            "earlier": [each["accuracy"] for each in earlier],
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

    def train(self, model: nn.Module, task: Task, rows: Rows, decay: float, lr: float, seed: int) -> None:
        """Train as the example does."""
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=decay)
        rates = schedule(optimizer, task.steps)
        model.train()
        for batch in islice(shuffled(rows.train, task.batch_size, seed), task.steps):
            F.cross_entropy(*predict(model, batch)).backward()
            torch.nn.utils.clip_grad_norm_(trained, LARGEST_NORM)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()

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
        means = torch.stack(found).unflatten(0, (self.tasks[0].layers, -1)).mean(1)
        rounded = [[round(value, 6) for value in column] for column in means.mT.tolist()]
        return dict(zip(("delta", "peak", "outputs", "inputs", "both"), rounded, strict=True))


def rows_of(tokenizer: Any, splits: Splits, written: bool) -> Rows:
    """The questions as tokens; their answers are written, or chosen among those that occur."""
    choices, first = torch.empty(0, dtype=torch.long), {}
    if not written:
        encoder = Encoder(tokenizer, {question.answer for question in splits.train}, LONGEST)
        choices = encoder.answer_tokens
        first = dict(zip(encoder.answers, choices.tolist(), strict=True))

    def row(question: Question) -> Row:
        answer = tokenizer(question.answer).input_ids if written else [first[question.answer]]
        return Row(tokenizer(question.prompt).input_ids, answer)

    train, validation, test = ([row(question) for question in part] for part in splits)
    return Rows(train, validation, test, choices)


def predict(model: nn.Module, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """The scores (tokens, vocabulary) of the answers' tokens, and the right ones, (tokens,).

    All questions lie in one row: without padding a step takes 0.6 of the time.
    """
    tokens: list[int] = []
    positions: list[int] = []
    kept: list[int] = []
    wanted: list[int] = []
    for prompt, answer in rows:
        positions += range(len(prompt) + len(answer) - 1)
        tokens += prompt + answer[:-1]
        kept += range(len(tokens) - len(answer), len(tokens))
        wanted += answer
    inputs = {"input_ids": torch.tensor([tokens]), "position_ids": torch.tensor([positions])}
    scores = model(**inputs, logits_to_keep=torch.tensor(kept), use_cache=False).logits[0]
    return scores, torch.tensor(wanted)


@torch.no_grad()
def score(model: nn.Module, rows: Rows) -> dict[str, float]:
    """How many test questions are answered right; where answers are written, their nats a token."""

    def all_of(part: Sequence[Row]) -> tuple[Tensor, Tensor]:
        pieces = [predict(model, part[start : start + TOGETHER]) for start in range(0, len(part), TOGETHER)]
        scores, wanted = (torch.cat(each) for each in zip(*pieces, strict=True))
        return scores, wanted

    scores, wanted = all_of(rows.test)
    count = {"questions": len(rows.test)}
    if not len(rows.choices):
        return count | {
            "loss": float(F.cross_entropy(scores, wanted)),
            "validation_loss": float(F.cross_entropy(*all_of(rows.validation))),
        }
    right = int((rows.choices[scores[:, rows.choices].argmax(-1)] == wanted).sum())
    return {"right": right, **count, "accuracy": right / len(rows.test)}
