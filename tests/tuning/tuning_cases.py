"""Entries made by hand, a clock that follows a script, and a notebook of what was saved and timed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smoa_kernels.definition.precision import PRECISIONS
from smoa_kernels.kernels import KERNELS, table
from smoa_kernels.kernels.architectures import facts
from smoa_kernels.kernels.identity import identity
from smoa_kernels.kernels.spec import Config, Key
from smoa_kernels.kernels.table import Choice, Entry, Table, Trial, read, select, user_table
from smoa_kernels.tuning.tuner import Job, Run, Tuned, tune

CPU = torch.device("cpu")


def shipped(kernel: str) -> tuple[Config, ...]:
    """What ships for the interpreter, in float32."""
    return KERNELS[kernel].shipped(facts("cpu"), PRECISIONS["fp32"])


PERMUTE_CONFIGS = shipped("permute")
needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="runs kernels on CPU tensors, which needs Triton's interpreter"
)
PERMUTE = Key("permute", "fp32", blocks=2, in_features=12, tokens=8, padded_in=64)
GRAD = Key("block_grad", "fp32", 3, 2, 12, 10, 8, 64, 64)
FORWARD = Key("forward", "bf16", 3, 2, 12, 10, 8)


def entry(
    key: Key = PERMUTE, *, seconds: dict[Choice, float], complete: bool = True, **changed: object
) -> Entry:
    """An entry of this machine, its identity `changed`."""
    now = identity(CPU, key.kernel)
    trials = tuple(Trial(choice, value) for choice, value in seconds.items())
    return Entry(key, replace(now, **changed), next(iter(seconds)), trials, complete)  # type: ignore[arg-type]


def permute_entry(key: Key = PERMUTE, **changed: object) -> Entry:
    """The second shipped configuration won."""
    first, second, third = PERMUTE_CONFIGS
    return entry(key, seconds={first: 3.0, second: 1.0, third: 2.0}, **changed)


def permute_job(key: Key = PERMUTE) -> Job:
    return Job(key, KERNELS["permute"].default(key, "cpu", 1), PERMUTE_CONFIGS)


def kept(path: Path | None = None) -> dict[Key, Entry]:
    """What a table holds, this machine's unless it is named; where it has one entry for each problem."""
    entries = read(path or user_table("cpu")).entries.values()
    found = {e.key: e for e in entries}
    assert len(found) == len(entries)
    return found


def ask(tokens: int = 8) -> object:
    """The launch parameters in force for `PERMUTE`, or for another number of tokens."""
    sizes = {"blocks": 2, "in_features": 12, "padded_in": 64}
    return select("permute", CPU, torch.float32, tokens=tokens, **sizes)


def forget() -> None:
    """As in a new process: no table has been read, nothing has been answered."""
    table.forget()


def scripted(seconds: Callable[[Choice], float]) -> Callable[[Run], float]:
    """A timer that runs what it times and answers by script."""

    def timer(run: Run) -> float:
        run()
        return seconds(run.choice)

    return timer


SPEED = dict(zip(PERMUTE_CONFIGS, (3.0, 1.0, 2.0), strict=True))


class Notebook:
    """A table in memory, and what was timed."""

    def __init__(self, *entries: Entry) -> None:
        self.table = Table({(e.key, e.identity): e for e in entries})
        self.timed: list[Choice] = []

    def seconds(self, choice: Choice) -> float:
        self.timed.append(choice)
        return SPEED[choice]

    def entry(self, key: Key = PERMUTE) -> Entry:
        return self.table.entries[key, identity(CPU, key.kernel)]

    def tune(
        self, jobs: list[Job], timer: Callable[[Run], float] | None = None, **options: object
    ) -> list[Tuned]:
        return tune(
            jobs,
            device=CPU,
            timer=timer or scripted(self.seconds),
            **{"known": self.table, "save": self.table.add} | options,  # type: ignore[arg-type]
        )
