"""Checks of an adapter that is being loaded, all of them before the first tensor is copied."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..sketch import TOLERANCE, sketch_distance, sketch_weight
from .offload import gathered, present

if TYPE_CHECKING:
    from .layer import SMoALayer

__all__ = ["check_adapter", "check_labels"]


def check_adapter(
    model: nn.Module, adapter_name: str, state: Mapping[str, Tensor], *, strict_base: bool
) -> None:
    """Whether `state`, keyed as the model's own state dict is, fits every SMoA layer of `model`.

    A layer of which `state` holds nothing is left to PEFT, which lists it among the missing keys.

    Raises:
        ValueError: naming the layer: a tensor is missing or has another shape, labels or ranks are out of range, or,
            where `strict_base`, W0 is another weight than the adapter was trained over (else a warning).
    """
    from .layer import STATE_KEYS, SMoALayer

    others: list[tuple[str, float]] = []
    for name, layer in model.named_modules():
        if not isinstance(layer, SMoALayer) or adapter_name not in layer.smoa_A:
            continue
        given = {key: state.get(f"{name}.{key}.{adapter_name}") for key in STATE_KEYS}
        if all(value is None for value in given.values()):
            continue
        check_labels(name, layer, adapter_name, given)
        sketch = state.get(f"{name}.smoa_sketch.{adapter_name}")
        if sketch is None:
            continue
        if sketch.shape != layer.smoa_sketch[adapter_name].shape:
            raise ValueError(f"{name}: smoa_sketch must have shape (33,), got {tuple(sketch.shape)}")
        with gathered(layer.innermost()), present(layer, layer.innermost()):
            weight = layer.base_weight()
            distance = 0.0 if weight.is_meta else sketch_distance(sketch, sketch_weight(weight))
        if not distance <= TOLERANCE:
            others.append((name, distance))
    if others:
        name, distance = max(others, key=lambda other: other[1])
        message = (
            f"the adapter was trained over another base weight in {len(others)} layers, for one {name} (it differs "
            f"by about {distance:.0%}, the same base in another precision by at most {TOLERANCE:.0%})"
        )
        if strict_base:
            raise ValueError(f"{message}; strict_base=True refuses it")
        warnings.warn(message, UserWarning, stacklevel=2)


def check_labels(name: str, layer: SMoALayer, adapter_name: str, given: Mapping[str, Any]) -> None:
    """Whether the tensors of one layer's adapter are complete, fit the layer and are in range."""
    missing = [key for key, value in given.items() if value is None]
    if missing:
        raise ValueError(f"{name}: the adapter lacks {', '.join(missing)}; nothing was loaded")
    for key, value in given.items():
        expected = tuple(getattr(layer, key)[adapter_name].shape)
        if tuple(value.shape) != expected:
            raise ValueError(
                f"size mismatch for {name}.{key}: the layer takes shape {expected}, the adapter has "
                f"{tuple(value.shape)}"
            )
    blocks, rho, r = layer.num_blocks[adapter_name], given["smoa_A"].shape[0], layer.r[adapter_name]
    for key in ("smoa_row_block", "smoa_col_block", "smoa_ranks"):
        if given[key].is_floating_point():
            raise ValueError(f"{name}: {key} must be integers, got {given[key].dtype}")
    if any(given[key].is_meta for key in ("smoa_row_block", "smoa_col_block", "smoa_ranks")):
        return
    for key in ("smoa_row_block", "smoa_col_block"):
        low, high = (int(bound) for bound in torch.aminmax(given[key]))
        if low < 0 or high >= blocks:
            raise ValueError(f"{name}: {key} must lie in [0, {blocks}), got values from {low} to {high}")
    ranks = given["smoa_ranks"].tolist()
    if min(ranks) < 0 or max(ranks) != rho or sum(ranks) != r:
        raise ValueError(f"{name}: smoa_ranks must sum to r={r} with a largest rank of {rho}, got {ranks}")
