"""Checkpoints of a run: written atomically, and readable by any number of processes with any parallelism."""

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from parallel import Team
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

# Options that may differ between a run and the one that it resumes.
FREE = {"output", "device", "eval_questions", "eval_split", "distributed", "checkpoint_every", "resume"}

# Expected when a single process saves.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class Checkpoints:
    """The folder ``checkpoints/`` of a run: ``step-N/`` with the adapter, the optimizer and the figures so far.

    A checkpoint is written under another name and then renamed; after that the previous one is removed. So the last
    checkpoint is complete even if a process dies.

    Args:
        folder: where they are.
        options: of the run; those that affect its results must equal the resumed run's.
        team: the processes that write and read together.
        every: steps between checkpoints; None for no checkpoints.
        resume: whether the run goes on from the last checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        options: dict[str, Any],
        team: Team,
        every: int | None = None,
        resume: bool = False,
    ) -> None:
        self.folder, self.team, self.every, self.resume = folder, team, every, resume
        self.options = {key: value for key, value in options.items() if key not in FREE}

    def last(self) -> Path:
        """Return the newest checkpoint.

        Raises:
            ValueError: if there is none.
        """
        found = [path for path in self.folder.glob("step-*") if path.suffix != ".partial"]
        if not found:
            raise ValueError(f"--resume: {self.folder} holds no checkpoint to resume from")
        return max(found, key=lambda path: int(path.name.removeprefix("step-")))

    def prepare(self) -> None:
        """Remove the checkpoints of an earlier run, or refuse if this run cannot resume from them.

        Raises:
            ValueError: if there is no checkpoint, or it is of a run with other options.
        """
        if not self.resume:
            if self.team.leads:
                shutil.rmtree(self.folder, ignore_errors=True)
            return
        last = self.last()
        recorded = json.loads((last / "run.json").read_text(encoding="utf-8"))["options"]
        for key, value in self.options.items():
            if recorded.get(key) != value:
                raise ValueError(f"the run in {last} had {key}={recorded.get(key)!r}, this one has {value!r}")

    def save(self, model: nn.Module, optimizer: Optimizer, figures: dict[str, list[Any]]) -> None:
        """Write the state after as many steps as ``figures["loss"]`` has."""
        place = self.folder / f"step-{len(figures['loss'])}"
        unfinished = place.with_name(f"{place.name}.partial")
        if self.team.leads:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            run = json.dumps({"options": self.options, "figures": figures})
            (unfinished / "run.json").write_text(run, encoding="utf-8")
        dcp.save(_state(model, optimizer), checkpoint_id=unfinished)  # all wait until it is written
        if self.team.leads:
            os.replace(unfinished, place)
            for path in self.folder.iterdir():
                if path != place:
                    shutil.rmtree(path)

    def load(self, model: nn.Module, optimizer: Optimizer) -> dict[str, list[Any]]:
        """Restore ``model`` and ``optimizer`` from the last checkpoint and return its figures."""
        last, state = self.last(), _state(model, optimizer)
        dcp.load(state, checkpoint_id=last)
        options = StateDictOptions(ignore_frozen_params=True, strict=False)
        given = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(model, optimizer, **given, options=options)
        figures: dict[str, list[Any]] = json.loads((last / "run.json").read_text(encoding="utf-8"))["figures"]
        return figures


def _state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    options = StateDictOptions(ignore_frozen_params=True)
    parameters, moments = get_state_dict(model, optimizer, options=options)
    return {"model": parameters, "optimizer": moments}
