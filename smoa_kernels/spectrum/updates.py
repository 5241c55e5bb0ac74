"""Reads the updates ΔW of a saved SMoA, LoRA or HiRA adapter without building a model, or draws random ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from ..definition.packed import pack_factors
from ..definition.partition import BlockPartition
from ..definition.ranks import trainable_parameters
from ..definition.reference import reference_delta_weight
from ..definition.sketch import sketch_weight
from ..peft.config import SMoAConfig
from ..peft.file_format import LayerBlocks
from ..peft.folders import PREFIX, by_number, read_config, read_layers, read_state, weights_of

__all__ = ["NAMES", "AdapterUpdates", "LayerUpdate", "random_lora", "random_smoa", "read_updates"]

# The methods' own spelling, by PEFT's names of its types.
NAMES = {"SMOA": "SMoA", "LORA": "LoRA", "HIRA": "HiRA"}
# The endings of the keys of A and B in files of the other methods.
_ENDINGS = {
    "LORA": (".lora_A.weight", ".lora_B.weight"),
    "HIRA": (".hira_A", ".hira_B"),
}


@dataclass(frozen=True)
class LayerUpdate:
    """The adapter of one layer.

    Attributes:
        method: SMoA, LoRA or HiRA.
        A: (ρ, C).
        B: (N, ρ).
        scaling: s.
        blocks: SMoA's blocks, ranks and sketch of W0; None for the others.
    """

    method: str
    A: Tensor
    B: Tensor
    scaling: float
    blocks: LayerBlocks | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, C)."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def ranks(self) -> list[int]:
        """The rank of each block."""
        return [self.A.shape[0]] if self.blocks is None else self.blocks.ranks.tolist()

    @property
    def parameters(self) -> int:
        """The number of trained parameters, without padding."""
        if self.blocks is None:
            return self.A.numel() + self.B.numel()
        return trainable_parameters(self.blocks.partition, self.ranks)

    def delta(self, weight: Tensor) -> Tensor:
        """ΔW in float64 over W0 (N, C)."""
        weight, A, B = weight.double(), self.A.double(), self.B.double()
        if self.blocks is not None:
            partition, ranks, _ = self.blocks
            return reference_delta_weight(weight, A, B, partition, ranks, scaling=self.scaling)
        product = self.scaling * (B @ A)
        return product * weight if self.method == "HiRA" else product


@dataclass(frozen=True)
class AdapterUpdates:
    """An adapter folder's updates.

    Attributes:
        method: SMoA, LoRA or HiRA.
        layers: sorted by name, with numbers by value; an expert's is that of the fused weight with its number,
            `mlp.experts.down_proj[7]`.
        fan_in_fan_out: the base stores its weights (C, N).
    """

    method: str
    layers: Mapping[str, LayerUpdate]
    fan_in_fan_out: bool


def read_updates(folder: Path, methods: Sequence[str] = tuple(NAMES)) -> AdapterUpdates:
    """Read an adapter of one of `methods` (PEFT's names), as `save_pretrained` wrote it.

    Raises:
        ValueError, FileNotFoundError: a file is missing, the adapter is another method's or DoRA's (whose update is no
            product of factors), it has no layers, factors are missing or do not fit each other, or labels or ranks are
            out of range.
    """
    config: Any = read_config(folder, methods)
    if getattr(config, "use_dora", False):
        raise ValueError(f"{folder}: it is a DoRA adapter, whose update is not a product of two factors")
    path = weights_of(folder)
    state = {key.removeprefix(PREFIX): tensor for key, tensor in read_state(path).items()}
    method = str(config.peft_type.value)
    layers = _smoa(path, state, config) if method == "SMOA" else _others(path, state, method, config)
    if not layers:
        raise ValueError(f"{path} holds no linear layer of an adapter of the method {method}")
    return AdapterUpdates(NAMES[method], layers, bool(config.fan_in_fan_out))


def random_smoa(weight: Tensor, ranks: Sequence[int], generator: torch.Generator) -> LayerUpdate:
    """Draw the factors of an SMoA adapter of W0 (N, C) from a normal distribution; `ranks` has one rank a block."""
    partition = BlockPartition.from_weight(weight, len(ranks))
    sizes = list(zip(ranks, partition.row_sizes, partition.col_sizes, strict=True))
    A, B, packed_ranks = pack_factors(
        [torch.randn(r, cols, generator=generator) for r, _, cols in sizes],
        [torch.randn(rows, r, generator=generator) for r, rows, _ in sizes],
        partition,
    )
    return LayerUpdate("SMoA", A, B, 1.0, LayerBlocks(partition, packed_ranks, sketch_weight(weight)))


def random_lora(shape: Sequence[int], parameters: int, generator: torch.Generator) -> LayerUpdate:
    """Draw the factors of a LoRA adapter from a normal distribution, at the rank that comes closest to `parameters`."""
    rank = max(1, round(parameters / sum(shape)))
    B = torch.randn(shape[0], rank, generator=generator)
    return LayerUpdate("LoRA", torch.randn(rank, shape[1], generator=generator), B, 1.0)


def _smoa(path: Path, state: Mapping[str, Tensor], config: SMoAConfig) -> dict[str, LayerUpdate]:
    found = read_layers(path, lambda name: config.for_layer(name).r)
    layers = {}
    for name in sorted(found, key=by_number):
        A, B = state[f"{name}.smoa_A"], state[f"{name}.smoa_B"]
        blocks, scaling = found[name], config.for_layer(name).scaling
        if isinstance(blocks, LayerBlocks):
            layers[name] = LayerUpdate("SMoA", A, B, scaling, blocks)
        else:
            for e, one in enumerate(blocks.experts()):
                layers[f"{name}[{e}]"] = LayerUpdate("SMoA", A[e], B[e], scaling, one)
    return layers


def _others(path: Path, state: Mapping[str, Tensor], method: str, config: Any) -> dict[str, LayerUpdate]:
    endings = _ENDINGS[method]
    layers = {}
    for name in sorted(
        {key.removesuffix(end) for key in state for end in endings if key.endswith(end)}, key=by_number
    ):
        missing = [end[1:] for end in endings if name + end not in state]
        if missing:
            raise ValueError(f"{path}: {name}: the adapter lacks {', '.join(missing)}")
        A, B = (state[name + end] for end in endings)
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
            raise ValueError(f"{path}: {name}: factors must be matrices (r, C) and (N, r), got {shapes}")
        scaling = _lora_scaling(config, name, A.shape[0]) if method == "LORA" else 1.0
        layers[name] = LayerUpdate(NAMES[method], A, B, scaling)
    return layers


def _lora_scaling(config: Any, name: str, rank: int) -> float:
    pattern = config.alpha_pattern or {}
    alpha = pattern.get(get_pattern_key(pattern.keys(), name), config.lora_alpha)
    return float(alpha) / (math.sqrt(rank) if config.use_rslora else rank)
