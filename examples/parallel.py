"""Several processes, started by torchrun or `accelerate launch`, as one run.

torchrun --nproc-per-node 2 examples/finetune.py --distributed ddp     # each has the model, and a part of a batch
torchrun --nproc-per-node 2 examples/finetune.py --distributed fsdp    # each has a part of both
torchrun --nproc-per-node 2 examples/finetune.py --distributed tp      # each has a part of every layer
"""

import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from smoa_kernels.distributed import (
    ColwiseSMoAParallel,
    RowwiseSMoAParallel,
    ignore_buffers,
    shared_spectra,
)

Kind = Literal["ddp", "fsdp", "tp"]
T = TypeVar("T")

STYLES = {"colwise": ColwiseSMoAParallel, "rowwise": RowwiseSMoAParallel}


@dataclass(frozen=True)
class Team:
    """The processes of a run, and which of them this one is.

    Attributes:
        kind: how they share the work; ``None`` for a single process.
        rank: of this process.
        size: the number of processes.
    """

    kind: Kind | None = None
    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that shows and writes."""
        return self.rank == 0

    @property
    def shares(self) -> int:
        """The number of parts of a batch."""
        return 1 if self.kind == "tp" else self.size

    def share(self, batch: Sequence[T]) -> Sequence[T]:
        """This process's part of a batch."""
        return batch[self.rank % self.shares :: self.shares]

    def seed(self, seed: int, step: int) -> None:
        """Seed dropout for a step, so that a resumed run draws the same masks; shares draw different ones."""
        # Python's hash of numbers is the same in every process.
        torch.manual_seed(hash((seed, step, self.rank % self.shares)) % 2**63)

    def gather(self, *values: float) -> list[tuple[float, ...]]:
        """Return the values of all processes, in order of rank."""
        if self.kind is None:
            return [values]
        place = "cuda" if dist.get_backend() == "nccl" else "cpu"
        own = torch.tensor(values, dtype=torch.float64, device=place)
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(everyone, own)
        return [tuple(row.tolist()) for row in everyone]

    def leave(self) -> None:
        """Leave the process group."""
        if self.kind is not None:
            dist.destroy_process_group()

    def injecting(self) -> AbstractContextManager[None]:
        """A context in which only the first process computes the spectra of the adapted layers."""
        return nullcontext() if self.kind is None else shared_spectra()

    def spread(self, model: PeftModel) -> nn.Module:
        """Spread ``model`` over the processes, in place, and return the model to train.

        Raises:
            ValueError: if it cannot be.
        """
        if self.kind == "ddp":
            ignore_buffers(model)
            return DistributedDataParallel(model)
        if self.kind == "fsdp":
            for layer in _decoder_layers(model):
                fully_shard(layer)
            return fully_shard(model)
        if self.kind == "tp":
            mesh = init_device_mesh(next(model.parameters()).device.type, (self.size,))
            parallelize_module(model.get_base_model().base_model, mesh, _plan(model, self.size))
        return model

    def whole_adapter(self, model: PeftModel) -> dict[str, Any]:
        """Return the adapter's whole tensors on the leading process; all processes must call it."""
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=self.kind is not None, ignore_frozen_params=True
        )
        return get_model_state_dict(model, options=options)


def _decoder_layers(model: PeftModel) -> nn.ModuleList:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError("--distributed fsdp shards a model by its list of layers, and this one has none")
    return max(lists, key=len)


def _plan(model: PeftModel, size: int) -> dict[str, Any]:
    """transformers' plan for cutting the model's layers, with our styles."""
    base = model.get_base_model()
    config = base.config.get_text_config()
    plan = config.base_model_tp_plan or {}
    if not plan:
        raise ValueError(
            f"transformers has no tensor-parallel plan for {type(base).__name__}: use ddp or fsdp"
        )
    heads = config.num_key_value_heads
    if heads % size:
        raise ValueError(f"{size} processes cannot share {heads} key and value heads evenly")
    return {name: STYLES[style]() for name, style in plan.items() if style in STYLES}


def join(kind: Kind | None, device: torch.device) -> Team:
    """Join the processes that a launcher has started.

    Raises:
        ValueError: if no launcher has, or one has and ``kind`` is ``None``.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if kind is None:
        if launched and int(os.environ["WORLD_SIZE"]) > 1:
            raise ValueError(f"{os.environ['WORLD_SIZE']} processes were launched: say ddp, fsdp or tp")
        return Team()
    if not launched:
        raise ValueError(
            f"{kind} wants a launcher: torchrun --nproc-per-node 2 {sys.argv[0]} --distributed {kind}"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Team(kind, dist.get_rank(), dist.get_world_size())


def own_device(device: torch.device) -> torch.device:
    """Return this process's own GPU if several processes share a machine's GPUs."""
    local = os.environ.get("LOCAL_RANK")
    return torch.device("cuda", int(local)) if local and device == torch.device("cuda") else device
