"""Chats to fine-tune on, from a JSONL file or from the PyPI package ``chatterbot-corpus`` (BSD).

The package's English dialogs are short questions and remarks with short answers: trivia, small talk, psychology.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from packages import file_of
from questions import read_lines, same_text

Chat = list[dict[str, str]]
"""Messages with a role and a content each, as chat templates take them."""


def locate() -> Path:
    """Return the folder of the English dialogs inside the installed package.

    Raises:
        FileNotFoundError: if the package is missing.
    """
    return file_of("chatterbot-corpus", "1.3.3", "chatterbot_corpus/data/english", ", or give --data")


def read_corpus(folder: Path) -> list[Chat]:
    """Read the dialogs of one question and one answer, each question once; dialogs about code are left out.

    Longer dialogs are left out too: in some of them several answers to one question follow each other.
    """
    chats: dict[str, Chat] = {}
    for path in sorted(folder.glob("*.yml")):
        if path.stem == "coding":  # its programs have lost their indices
            continue
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            if len(turns) == 2:
                question, answer = (str(turn).strip() for turn in turns)
                asked = {"role": "user", "content": question}
                chats.setdefault(same_text(question), [asked, {"role": "assistant", "content": answer}])
    return list(chats.values())


def read_jsonl(path: Path) -> list[Chat]:
    """Read a chat per line, ``{"messages": [{"role": "user", "content": "…"}, …]}``.

    Raises:
        ValueError: if a line is something else; the message names it.
    """

    def chat(record: Any) -> Chat:
        return [{"role": str(m["role"]), "content": str(m["content"])} for m in record["messages"]]

    return [one for _, one in read_lines(path, chat, '{"messages": [{"role", "content"}, …]}')]


def turns(chats: Sequence[Chat]) -> list[dict[str, Any]]:
    """Return TRL's "prompt" and "completion" for each answer of an assistant: only answers are trained."""
    return [
        {"prompt": chat[:i], "completion": [message]}
        for chat in chats
        for i, message in enumerate(chat)
        if i and message["role"] == "assistant"
    ]
