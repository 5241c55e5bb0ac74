"""The training loop and the evaluation."""

import inspect
import math
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from checkpoints import Checkpoints
from parallel import Team
from questions import Batch, Encoder, Question, T
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

LINE_EVERY = 10  # steps
LARGEST_NORM = 1.0  # of all gradients, clipped like the Trainer's: without it some runs spike


@dataclass
class TrainingRecord:
    """Time, tokens and loss of every step."""

    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.loss)

    @property
    def median_step_seconds(self) -> float:
        """Median time of a step, in seconds."""
        return statistics.median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Prompt tokens, without padding, over the time of all steps."""
        return sum(self.tokens) / sum(self.seconds)

    def summary(self) -> dict[str, Any]:
        """As JSON holds it."""
        names = ("steps", "median_step_seconds", "tokens_per_second", "loss")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Score:
    """Right answers among a number of questions."""

    right: int
    questions: int

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.questions

    @property
    def standard_error(self) -> float:
        """Standard error of the share (binomial)."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.questions)

    def record(self) -> dict[str, float]:
        """As JSON holds it."""
        return asdict(self) | {"accuracy": self.accuracy, "standard_error": self.standard_error}

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.1f} % ± {100 * self.standard_error:.1f}"


class StopRequest:
    """Records Ctrl-C (SIGINT) and SIGTERM instead of ending the process, so that no step or save is interrupted.

    ``signal`` is the number of the first signal, or ``None``. Job schedulers often send a second one.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number


def shuffled(questions: Sequence[T], size: int, seed: int) -> Iterator[list[T]]:
    """Yield ``size`` questions at a time without end; each pass over them is in another order."""
    shuffle = random.Random(seed).shuffle
    order: list[T] = []
    while True:
        while len(order) < size:
            again = list(questions)
            shuffle(again)
            order += again
        yield order[:size]
        del order[:size]


def shuffled_batches(
    questions: Sequence[Question],
    encoder: Encoder,
    size: int,
    seed: int,
    team: Team = Team(),  # noqa: B008  it is frozen
) -> Iterator[Batch]:
    """Yield batches of :func:`shuffled` questions. A team shares each of them."""
    for drawn in shuffled(questions, size, seed):
        yield encoder.batch(team.share(drawn))


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Let the learning rate rise over the first tenth of the steps, then fall linearly to zero."""
    warmup = max(1, steps // 10)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )


def next_token_scores(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the scores (questions, vocabulary) of the token after each left-padded prompt."""
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    bare = bare.get_base_model() if hasattr(bare, "get_base_model") else bare
    known = inspect.signature(bare.forward).parameters
    extra: dict[str, Any] = {}
    if "logits_to_keep" in known:  # without it the head would score every position of every prompt
        # An index tensor, not a number: a slice of positions is a view with gaps, and torch's CPU code would then copy
        # a frozen head's weight once per prompt.
        extra["logits_to_keep"] = torch.tensor([-1])
    if "position_ids" in known:  # learned positions must not count the padding
        extra["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **extra)
    return output.logits[:, -1]


def train(
    model: nn.Module,
    batches: Iterator[Batch],
    *,
    steps: int,
    lr: float,
    device: torch.device,
    stop: StopRequest,
    say: Callable[[str], object] = print,
    seed: int = 0,
    team: Team = Team(),  # noqa: B008
    checkpoints: Checkpoints | None = None,
) -> TrainingRecord:
    """Train what requires grad with AdamW, at a rate that rises and falls by :func:`schedule`.

    The loss is the cross-entropy of the answer's first token over the whole vocabulary, so that the adapted model
    generates the answer. Training ends early, after a whole step, if ``stop`` has noted a signal on any process of
    ``team``. It reports progress every tenth step and saves ``checkpoints``. A resumed run starts from the last one.

    Raises:
        ValueError: if the loss is infinite or not a number.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    rates = schedule(optimizer, steps)
    record = TrainingRecord()
    if checkpoints is not None and checkpoints.resume:
        record = TrainingRecord(**checkpoints.load(model, optimizer))
        rates.load_state_dict(rates.state_dict() | {"last_epoch": record.steps})
        for _ in range(record.steps):
            next(batches)
    model.train()
    while record.steps < steps and stop.signal is None:
        begin = time.perf_counter()
        team.seed(seed, record.steps)
        batch = next(batches).to(device)
        scores = next_token_scores(model, batch.input_ids, batch.attention_mask)
        loss = F.cross_entropy(scores.to(torch.promote_types(scores.dtype, torch.float32)), batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, LARGEST_NORM)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        # `item` waits for an accelerator, so the time below is the whole step's.
        losses, tokens, signals = zip(*team.gather(loss.item(), batch.tokens, stop.signal or 0), strict=True)
        record.loss.append(sum(losses) / team.size)
        record.seconds.append(time.perf_counter() - begin)
        record.tokens.append(round(sum(tokens) * team.shares / team.size))
        stop.signal = round(max(signals)) or None
        if not math.isfinite(record.loss[-1]):
            raise ValueError(f"the loss became {record.loss[-1]} at step {record.steps}; try a smaller --lr")
        if record.steps in (1, steps) or record.steps % LINE_EVERY == 0:
            say(f"step {record.steps} of {steps}  loss {record.loss[-1]:.3f}")
        if checkpoints is not None and checkpoints.every and record.steps % checkpoints.every == 0:
            checkpoints.save(model, optimizer, asdict(record))
    return record


@torch.no_grad()
def answer(
    model: nn.Module,
    encoder: Encoder,
    questions: Sequence[Question],
    batch_size: int,
    device: torch.device,
) -> list[str]:
    """Return the model's answers: of all answers in the data, the one whose first token scores highest."""
    model.eval()
    answers = [""] * len(questions)
    # Questions of similar length share a batch, so that there is little padding.
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = encoder.batch([questions[i] for i in indices]).to(device)
        scores = next_token_scores(model, batch.input_ids, batch.attention_mask)
        scores = scores[:, encoder.answer_tokens.to(device)]
        for i, choice in zip(indices, scores.argmax(-1).tolist(), strict=True):
            answers[i] = encoder.answers[choice]
    return answers


def score(answers: Sequence[str], questions: Sequence[Question]) -> Score:
    """Count the right answers."""
    pairs = zip(answers, questions, strict=True)
    return Score(sum(given == question.answer for given, question in pairs), len(questions))
