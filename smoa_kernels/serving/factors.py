"""Reads an SMoA or HiRA adapter's folder as tensors of LoRA's shapes, which an engine's slots for LoRA can hold.

With zeros outside their blocks, the A_k stacked to (r, C) and the B_k to (N, r) have the product mask ∘ (BA). So an
engine's loading, slots, caches and slicing for tensor parallelism work unchanged; only the layer's computation differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapter_folder.format import CONFIG_NAME, HIRA, METHOD, WEIGHTS_NAME
from ..adapter_folder.reading import read_adapter, read_config, read_hira, read_json
from ..definition.packed import PackedAdapter, scaling_tensor

MERGE = "`smoa-kernels merge` writes a model of its own instead"


class LayerFactors(NamedTuple):
    """One layer's factors: `y += x (W0 ∘ BA)ᵀ`."""

    A: Tensor  # (r, C): the A_k one below the other, zero outside the columns of their blocks
    B: Tensor  # (N, r), float32: the B_k side by side, zero outside the rows of their blocks; s is folded in
    ranks: tuple[int, ...]  # r_k of each block
    sketch: Tensor | None  # of W0, where the folder has one


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter's folder, read and checked.

    Attributes:
        folder: the folder.
        layers: the factors of each layer, by its path in the base model.
        strict_base: refuse another base rather than warn.
    """

    folder: Path
    layers: dict[str, LayerFactors]
    strict_base: bool

    @property
    def rank(self) -> int:
        """The largest rank r of a layer, over all its blocks."""
        return max(factors.A.shape[0] for factors in self.layers.values())

    def ranks(self, name: str) -> tuple[int, ...]:
        """r_k of each block of a layer; empty for a layer without an adapter."""
        return self.layers[name].ranks if name in self.layers else ()


def served_method(folder: Path) -> str | None:
    """The method of a folder that we serve, "SMOA" or "HIRA"; None for any other, or if nothing can be read."""
    try:
        method = read_json(folder / CONFIG_NAME).get("peft_type")
    except (OSError, ValueError):
        return None  # the engine reports the error
    return method if method in (METHOD, HIRA) else None


def read_served(folder: Path) -> ServedAdapter:
    """Read the folder of an SMoA or HiRA adapter.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or of another format version, or the adapter has parts that no engine can hold:
            experts, embeddings, convolutions, modules or biases saved in full, weights stored transposed.
    """
    config = read_config(folder, (METHOD, HIRA))
    for key in ("modules_to_save", "target_parameters", "fan_in_fan_out", "bias"):
        if config.get(key) not in (None, False, [], "none"):
            raise _refusal(folder / CONFIG_NAME, f"{key}={config[key]}")
    layers = _smoa_layers(folder) if config["peft_type"] == METHOD else _hira_layers(folder)
    return ServedAdapter(folder, layers, bool(config.get("strict_base")))


def _smoa_layers(folder: Path) -> dict[str, LayerFactors]:
    adapter = read_adapter(folder)
    for key in adapter.whole:
        raise _refusal(adapter.path, key)
    layers = {}
    for name, blocks in adapter.layers.items():
        if blocks.of_experts:
            raise _refusal(adapter.path, f"{name}, a weight of experts,")
        A, B = (adapter.of_layer(name)[key].float() for key in ("smoa_A", "smoa_B"))
        ranks, s = blocks.ranks.tolist(), scaling_tensor(adapter.settings.for_layer(name).scaling, A.device)
        weight = torch.empty(blocks.partition.shape, device="meta")  # the factors do not depend on its values
        packed = PackedAdapter(weight, A, B, blocks.partition, blocks.ranks, s, ranks)
        layers[name] = LayerFactors(*packed.expanded_factors(torch.float32), tuple(ranks), blocks.sketch)
    return layers


def _hira_layers(folder: Path) -> dict[str, LayerFactors]:
    layers, whole = read_hira(folder)
    for key in whole:
        raise _refusal(folder / WEIGHTS_NAME, key)
    return {name: LayerFactors(A.float(), B.float(), (A.shape[0],), None) for name, (A, B) in layers.items()}


def _refusal(path: Path, what: str) -> ValueError:
    return ValueError(f"{path}: {what} cannot be served; {MERGE}")
