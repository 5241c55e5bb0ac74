"""Checkpoints of a run: written whole, read by any number of processes, however they share the work."""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from parallel import Team
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

# What may differ between a run and the one that it resumes.
FREE = {
    "output",
    "device",
    "threads",
    "eval_questions",
    "eval_split",
    "distributed",
    "checkpoint_every",
    "resume",
}


class Checkpoints:
    """The folder ``checkpoints/`` of a run: ``step-N/`` with the adapter, the optimizer and the figures so far.

    A checkpoint is written beside its place and then renamed, and the one before is removed after that: whenever a
    process dies, the last one is whole.

    Args:
        folder: where they are.
        options: of the run; those that bear on its numbers must be the resumed one's.
        team: the processes that write and read together.
    """

    def __init__(self, folder: Path, options: dict[str, Any], team: Team) -> None:
        self.folder, self.team = folder, team
        self.options = {key: value for key, value in options.items() if key not in FREE}

    def last(self) -> Path | None:
        """Return the newest checkpoint."""
        found = [path for path in self.folder.glob("step-*") if path.suffix != ".partial"]
        return max(found, key=lambda path: int(path.name.removeprefix("step-")), default=None)

    def prepare(self, resume: bool) -> None:
        """Remove those of an earlier run, or complain if this one cannot ``resume`` it.

        Raises:
            ValueError: if there is no checkpoint, or it is of a run with other options.
        """
        if not resume:
            if self.team.leads:
                shutil.rmtree(self.folder, ignore_errors=True)
            return
        last = self.last()
        if last is None:
            raise ValueError(f"{self.folder} holds no checkpoint to resume from")
        theirs = json.loads((last / "run.json").read_text(encoding="utf-8"))["options"]
        for key, value in self.options.items():
            if theirs.get(key) != value:
                raise ValueError(f"the run in {last} had {key}={theirs.get(key)!r}, this one has {value!r}")

    def save(self, model: nn.Module, optimizer: Optimizer, figures: dict[str, list[Any]]) -> None:
        """Write the state after as many steps as ``figures["loss"]`` has.

        Raises:
            OSError: it cannot be written; the one before is whole.
        """
        name = f"step-{len(figures['loss'])}"
        unfinished, place = self.folder / f"{name}.partial", self.folder / name
        try:
            self._write(unfinished, model, optimizer, figures)
        except OSError as error:
            if self.team.leads:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise OSError(f"cannot write the checkpoint {place}, the one before is whole: {error}") from error
        if self.team.leads:
            os.replace(unfinished, place)
            for path in self.folder.iterdir():
                if path != place:
                    shutil.rmtree(path)

    def _write(
        self, folder: Path, model: nn.Module, optimizer: Optimizer, figures: dict[str, list[Any]]
    ) -> None:
        if self.team.leads:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            run = json.dumps({"options": self.options, "figures": figures})
            (folder / "run.json").write_text(run, encoding="utf-8")
        try:
            with _quiet():
                dcp.save(self._state(model, optimizer), checkpoint_id=folder)  # all wait until it is written
        except CheckpointException as error:  # a BaseException of torch's, around what each process met
            reasons = [reason for reason, _ in error.failures.values()]
            if not all(isinstance(reason, (OSError, RuntimeError)) for reason in reasons):
                raise
            raise OSError(reasons[0]) from error

    def load(self, model: nn.Module, optimizer: Optimizer) -> dict[str, list[Any]]:
        """Restore ``model`` and ``optimizer`` from the last one and return its figures."""
        last = self.last()
        assert last is not None  # `prepare` has said so
        state = self._state(model, optimizer)
        with _quiet():
            dcp.load(state, checkpoint_id=last)
        options = StateDictOptions(ignore_frozen_params=True, strict=False)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=options,
        )
        return json.loads((last / "run.json").read_text(encoding="utf-8"))["figures"]

    @staticmethod
    def _state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        parameters, moments = get_state_dict(
            model, optimizer, options=StateDictOptions(ignore_frozen_params=True)
        )
        return {"model": parameters, "optimizer": moments}


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled"
        )  # as it is meant to be, alone
        yield
