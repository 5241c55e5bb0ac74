"""Questions with short answers: reading, splitting, and batching them.

One token answers a question, so a language model classifies without a new head: the prompt ends where the answer
begins, and the model's scores of the answers' first tokens are compared.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

SPLIT_SEED = 0  # not the run's --seed: every run and every method must be judged on the same questions
MOST_HELD_OUT = 500
FEWEST_QUESTIONS = 10
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A prompt, and the answer that follows it after one space."""

    prompt: str
    answer: str


class Splits(NamedTuple):
    """Disjoint lists: fit on ``train``, choose settings on ``validation``, report on ``test``."""

    train: list[Question]
    validation: list[Question]
    test: list[Question]


def same_text(text: str) -> str:
    """Normalise case and white space."""
    return " ".join(text.casefold().split())


def read_jsonl(path: Path) -> list[Question]:
    """Read one ``{"prompt": ..., "answer": ...}`` object per line; a repeated question is kept once.

    Raises:
        ValueError: if a line is something else, or a prompt has two answers; the message names the line.
    """

    def read(record: Any) -> Question:
        return Question(record["prompt"].rstrip(), record["answer"].strip())

    found: dict[str, Question] = {}
    for number, question in read_lines(path, read, '{"prompt": "…", "answer": "…"}'):
        known = found.setdefault(same_text(question.prompt), question).answer
        if known != question.answer:
            raise ValueError(
                f"{path}, line {number}: a prompt from above again, but not its answer {known!r}"
            )
    return list(found.values())


def read_lines(path: Path, read: Callable[[Any], T], form: str) -> Iterator[tuple[int, T]]:
    """Yield the line number and the parsed value of each JSON line that is not empty.

    Raises:
        ValueError: if a line has another form; the message names it.
    """
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                found = read(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{path}, line {number} is no {form}") from error
            yield number, found


def split(questions: Sequence[Question], one_in: int = 10) -> Splits:
    """Shuffle with a fixed seed; hold out a tenth, at most 500, for validation and as many for the test.

    Args:
        questions: all there are.
        one_in: 10 holds out a tenth, 4 a quarter.

    Raises:
        ValueError: if there are fewer than ten questions.
    """
    if len(questions) < FEWEST_QUESTIONS:
        raise ValueError(f"{len(questions)} different questions; at least {FEWEST_QUESTIONS} are needed")
    shuffled = list(questions)
    random.Random(SPLIT_SEED).shuffle(shuffled)
    held_out = min(len(shuffled) // one_in, MOST_HELD_OUT)
    return Splits(shuffled[2 * held_out :], shuffled[:held_out], shuffled[held_out : 2 * held_out])


@dataclass(frozen=True)
class Batch:
    """Left-padded prompts, so that the answer follows the last position of each row.

    Shapes: ``input_ids`` and ``attention_mask`` (questions, longest prompt); ``targets`` (questions,), the answers'
    first tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    tokens: int  # of the prompts, without padding

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on ``device``."""
        tensors = (self.input_ids, self.attention_mask, self.targets)
        return Batch(*(tensor.to(device) for tensor in tensors), tokens=self.tokens)


class Encoder:
    """Turns questions into batches for one tokenizer.

    Args:
        tokenizer: of the model that is to answer.
        answers: every answer that occurs.
        longest_prompt: the most tokens that the model takes.

    Raises:
        ValueError: if there are fewer than two answers, or two of them begin with the same token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, answers: set[str], longest_prompt: int) -> None:
        if len(answers) < 2:
            raise ValueError(f"at least two different answers are needed, not {len(answers)}")
        self.tokenizer = tokenizer
        self.answers = sorted(answers)
        self.longest_prompt = longest_prompt
        owner: dict[int, str] = {}
        for answer in self.answers:
            other = owner.setdefault(self._first_token(answer), answer)
            if other != answer:
                raise ValueError(
                    f"the answers {other!r} and {answer!r} begin with the same token; reword one of them"
                )
        self.answer_tokens = torch.tensor(list(owner))
        # Padding is masked, so any token serves if the tokenizer has none for padding.
        self.padding = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)

    def _first_token(self, answer: str) -> int:
        # Tokenized in context, because SentencePiece tokenizers mark the beginning of every text.
        before = self.tokenizer(":", add_special_tokens=False).input_ids
        whole = self.tokenizer(f": {answer}", add_special_tokens=False).input_ids
        if whole[: len(before)] != before or len(whole) == len(before):
            raise ValueError(f"the tokenizer gives the answer {answer!r} no token of its own after a prompt")
        return whole[len(before)]

    def check(self, questions: Sequence[Question]) -> None:
        """Check all questions, so that :meth:`batch` cannot fail in the middle of a run.

        Raises:
            ValueError: if a prompt has no token, or more than the model takes.
        """
        rows = self.tokenizer([question.prompt for question in questions]).input_ids
        for question, row in zip(questions, rows, strict=True):
            if not 1 <= len(row) <= self.longest_prompt:
                raise ValueError(
                    f"the prompt {question.prompt[:40]!r} has {len(row)} tokens,"
                    f" the model takes 1 to {self.longest_prompt}"
                )

    def batch(self, questions: Sequence[Question]) -> Batch:
        """Tokenize and pad."""
        rows = [self.tokenizer(question.prompt).input_ids for question in questions]
        width = max(len(row) for row in rows)
        answers = [self.answers.index(question.answer) for question in questions]
        return Batch(
            input_ids=torch.tensor([[self.padding] * (width - len(row)) + row for row in rows]),
            attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
            targets=self.answer_tokens[answers],
            tokens=sum(len(row) for row in rows),
        )
