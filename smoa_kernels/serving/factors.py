"""Reads an SMoA or HiRA adapter's folder as tensors of LoRA's shapes, which an engine's slots for LoRA can hold.

With zeros outside their blocks, the A_k stacked to (r, C) and the B_k to (N, r) have the product mask ∘ (BA). So an
engine's slots, caches and slicing for tensor parallelism work unchanged; only the layer's computation differs.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapter_folder.format import CONFIG_NAME, HIRA, METHOD, WEIGHTS_NAME
from ..adapter_folder.reading import Adapter, read_adapter, read_json

MERGE = "`smoa-kernels merge` writes a model of its own instead"


class Labels(NamedTuple):
    """A layer's blocks, in the shape of factors of rank 1, so that an engine cuts them as it cuts factors."""

    rows: Tensor  # (N, 1): the block of each row of W0
    cols: Tensor  # (1, C)
    ranks: tuple[int, ...]  # r_k of each block


class LayerFactors(NamedTuple):
    """One layer's factors: `y += x (W0 ∘ BA)ᵀ`."""

    A: Tensor  # (r, C): the A_k below each other, zero outside the columns of their blocks
    B: Tensor  # (N, r), float32: the B_k side by side, zero outside the rows of their blocks; s is folded in
    labels: Labels
    sketch: Tensor | None  # of W0, where the folder has one


class ServedAdapter(NamedTuple):
    """An adapter's folder, read and checked."""

    layers: dict[str, LayerFactors]  # by path in the base model
    rank: int  # the largest rank r of a layer, over all its blocks
    strict_base: bool  # refuse another base rather than warn


def read_served(folder: Path) -> ServedAdapter | None:
    """Read the folder of an SMoA or HiRA adapter; None if it is another method's, or has no readable configuration.

    Raises:
        FileNotFoundError: the file of weights is missing.
        ValueError: a file is damaged or of another format version, or the adapter has parts that no engine can hold:
            experts, embeddings, convolutions, modules or biases saved in full, weights stored transposed.
    """
    try:
        config = read_json(folder / CONFIG_NAME)
    except (OSError, ValueError):
        return None  # the engine reports the error
    if config.get("peft_type") not in (METHOD, HIRA):
        return None
    for key in ("modules_to_save", "target_parameters", "fan_in_fan_out", "bias"):
        if config.get(key) not in (None, False, [], "none"):
            raise _refusal(folder / CONFIG_NAME, f"{key}={config[key]}")
    adapter = read_adapter(folder, (METHOD, HIRA))
    layers = {name: _factors(adapter, name) for name in adapter.layers}
    for key in adapter.in_full:
        raise _refusal(folder / WEIGHTS_NAME, key)
    rank = max(len(factors.A) for factors in layers.values())
    return ServedAdapter(layers, rank, bool(config.get("strict_base")))


def _factors(adapter: Adapter, name: str) -> LayerFactors:
    stored = adapter.layers[name]
    if stored.of_experts:
        raise _refusal(adapter.path, f"{name}, a weight of experts,")
    weight = torch.empty(stored.shape, device="meta")  # the factors do not depend on its values
    factors = stored.packed(weight).expanded_factors(torch.float32)
    rows, cols = stored.row_block.clone(), stored.col_block.clone()  # else they would share the file's memory
    labels = Labels(rows[:, None], cols[None], tuple(stored.ranks.tolist()))
    return LayerFactors(*factors, labels, None if adapter.is_hira else stored.sketch)


def _refusal(path: Path, what: str) -> ValueError:
    return ValueError(f"{path}: {what} cannot be served; {MERGE}")
