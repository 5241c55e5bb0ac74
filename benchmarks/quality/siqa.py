"""Social IQa (Sap et al. 2019): development questions, as BIG-bench has them (package ``bigbench``, Apache-2.0).

The package is published as source alone, 358 MB, so it is downloaded, not installed (`make quality-data`); the
task's file is taken out of it once. Nothing of it is copied into this repository, as BIG-bench asks.
"""

from __future__ import annotations

import json
import os
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from questions import Question, same_text

from examples.smollm2 import cache_folder

ARCHIVE = "bigbench-1.0.0.tar.gz"
MEMBER = "bigbench-1.0.0/bigbench/benchmark_tasks/social_iqa/task.json"
LETTERS = "ABC"


def locate() -> Path:
    """Return the task's file in the cache folder, which is filled from the downloaded package the first time.

    Raises:
        FileNotFoundError: if the package has not been downloaded.
    """
    folder = cache_folder()
    path = folder / "social_iqa.json"
    if not path.is_file():
        if not (folder / ARCHIVE).is_file():
            raise FileNotFoundError(
                f"Social IQa comes with the package bigbench, once: make quality-data fills {folder}"
            )
        with tarfile.open(folder / ARCHIVE) as archive:
            member = archive.extractfile(MEMBER)
            assert member is not None  # extractfile raises KeyError where there is none
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as unfinished:
                unfinished.write(member.read())
        os.replace(unfinished.name, path)
    return path


def read() -> list[Question]:
    """Read the questions, their three answers lettered: the answer is a letter."""
    examples: list[dict[str, Any]] = json.loads(locate().read_text(encoding="utf-8"))["examples"]
    questions: dict[str, Question] = {}
    for example in examples:
        scores: dict[str, int] = example["target_scores"]
        if len(scores) == len(LETTERS):
            listed = "\n".join(f"{letter}. {answer}" for letter, answer in zip(LETTERS, scores, strict=True))
            right = LETTERS[list(scores.values()).index(1)]
            prompt = f"{example['input'].strip()}\n{listed}\nAnswer:"
            questions.setdefault(same_text(prompt), Question(prompt, right))
    return list(questions.values())
