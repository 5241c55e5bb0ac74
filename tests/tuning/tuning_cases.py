"""Hand-made entries, a scripted timer, and access to this machine's table."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smoa_kernels.definition.precision import PRECISIONS
from smoa_kernels.kernels import KERNELS, table
from smoa_kernels.kernels.architectures import facts, identity
from smoa_kernels.kernels.spec import Config, Key
from smoa_kernels.kernels.table import SCHEMA, Choice, Entry, Trial, keep, read, select, user_table
from smoa_kernels.tuning.plan import Job
from smoa_kernels.tuning.problem import Problem

CPU = torch.device("cpu")


def shipped(kernel: str) -> tuple[Config, ...]:
    """The interpreter's shipped configurations in float32."""
    return KERNELS[kernel].shipped(facts("cpu"), PRECISIONS["fp32"])


PERMUTE_CONFIGS = shipped("permute")
needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="runs kernels on CPU tensors, which needs Triton's interpreter"
)
PERMUTE = Key("permute", "fp32", blocks=2, in_features=12, tokens=8, padded_in=64)
FORWARD = Key("forward", "bf16", 3, 2, 12, 10, 8)
SPEED = dict(zip(PERMUTE_CONFIGS, (3.0, 1.0, 2.0), strict=True))
"""The second shipped configuration is the fastest."""


def entry(key: Key = PERMUTE, seconds: dict[Choice, float] = SPEED, **changed: object) -> Entry:
    """An entry of this machine, with the `changed` fields of its identity."""
    trials = tuple(Trial(choice, value) for choice, value in seconds.items())
    return Entry(key, replace(identity(CPU), **changed), trials)  # type: ignore[arg-type]


def write(*entries: Entry, path: Path | None = None) -> None:
    """Write a table file, by default this machine's."""
    path = path or user_table("cpu")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": SCHEMA, "entries": [e.to_json() for e in entries]}))
    table.forget()


def put(*entries: Entry) -> None:
    """Add to this machine's table as the tuner does."""
    for one in entries:
        keep(identity(CPU), one.key, *one.trials)


def permute_job(tokens: int = 8) -> Job:
    """The job of `PERMUTE`, with `tokens` tokens."""
    layer = Problem(tokens, 10, 12, 2, 5, "fp32")
    split = {Key("forward", "fp32", 3, 2, 10, 12, tokens, factors="fp32"): "split"}
    return Job(PERMUTE._replace(tokens=tokens), PERMUTE_CONFIGS, layer, "forward", split)


def kept() -> dict[Key, Entry]:
    """The entries in force of this machine's table."""
    return read(user_table("cpu"), identity(CPU)).entries


def ask() -> object:
    """The launch parameters in force for `PERMUTE`."""
    return select(PERMUTE, CPU)


def scripted(
    seconds: Callable[[Choice], float], timed: list[Choice] | None = None
) -> Callable[[Choice, Callable[[], object]], float]:
    """A timer that runs the launch and returns scripted seconds."""

    def timer(choice: Choice, launch: Callable[[], object]) -> float:
        launch()
        if timed is not None:
            timed.append(choice)
        return seconds(choice)

    return timer
