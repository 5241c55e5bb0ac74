"""Checks of an adapter that is being loaded, all of them before the first tensor is copied."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..sketch import TOLERANCE, sketch_distance
from .layout import STATE_KEYS, LayerBlocks, unpack_blocks
from .offload import gathered, present

if TYPE_CHECKING:
    from .layer import SMoALayer

__all__ = ["check_adapter", "check_layer", "read_blocks"]


def check_adapter(
    model: nn.Module, adapter_name: str, state: Mapping[str, Tensor], *, strict_base: bool
) -> None:
    """Whether `state`, keyed as the model's own state dict is, fits every SMoA layer of `model`.

    A `state` without any SMoA tensor is left to PEFT, unless it was to fill layers that were just put in.

    Raises:
        ValueError: naming the layer: a tensor is missing, corrupt or has another shape, labels or ranks are out of
            range, the model has no such layer, or, where `strict_base`, W0 is another weight than the adapter was
            trained over (else a warning).
    """
    from .layer import SMoALayer

    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, SMoALayer) and adapter_name in module.smoa_A
    }
    places = {f"{name}.{key}.{adapter_name}" for name in layers for key in STATE_KEYS}
    homeless = [key for key in state if ".smoa_" in key and key not in places]
    if homeless:
        raise ValueError(
            f"the model has no place for {len(homeless)} tensors of the adapter, for one {homeless[0]}; nothing was "
            "loaded"
        )
    holds_adapter = any(key in places for key in state)
    sketches: dict[str, Tensor] = {}
    for name, layer in layers.items():
        given = {key: state.get(f"{name}.{key}.{adapter_name}") for key in STATE_KEYS}
        if holds_adapter or layer.awaits_blocks(adapter_name):
            sketch = check_layer(name, layer, adapter_name, given)
            if sketch is not None:
                sketches[name] = sketch
    others: list[tuple[str, float]] = []
    for name, sketch in sketches.items():
        layer = layers[name]
        with gathered(layer.innermost()), present(layer, layer.innermost()):
            own = layer.base_sketch()
            distance = 0.0 if own.is_meta else sketch_distance(sketch, own)
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


def check_layer(name: str, layer: SMoALayer, adapter_name: str, given: Mapping[str, Any]) -> Tensor | None:
    """Whether the tensors of one layer's adapter are complete, fit the layer and are in range.

    Returns:
        The sketch of the base weight that the adapter was trained over; None where the tensors hold no values.
    """
    _check_complete(name, given)
    for key, value in given.items():
        expected = tuple(getattr(layer, key)[adapter_name].shape)
        if tuple(value.shape) != expected:
            raise ValueError(
                f"size mismatch for {name}.{key}: the layer takes shape {expected}, the adapter has "
                f"{tuple(value.shape)}"
            )
    if given["smoa_blocks"].is_meta:
        return None
    return read_blocks(name, given, layer.r[adapter_name]).sketch


def _check_complete(name: str, given: Mapping[str, Any]) -> None:
    missing = [key for key, value in given.items() if value is None]
    if missing:
        raise ValueError(f"{name}: the adapter lacks {', '.join(missing)}; nothing was loaded")


def read_blocks(name: str, given: Mapping[str, Any], r: int | None = None) -> LayerBlocks:
    """Blocks, ranks and sketch of a layer whose tensors are `given` and whose rank budget is r, where that is known.

    Raises:
        ValueError: naming the layer, a tensor that is missing, what :func:`unpack_blocks` finds wrong, factors of
            another kind, or ranks that do not fit.
    """
    _check_complete(name, given)
    A, B = given["smoa_A"], given["smoa_B"]
    for key, factor in (("smoa_A", A), ("smoa_B", B)):
        if factor.ndim != 2 or not factor.is_floating_point():
            raise ValueError(
                f"{name}: {key} must be a matrix of floating-point numbers, got {factor.dtype} {tuple(factor.shape)}"
            )
    try:
        blocks = unpack_blocks(given["smoa_blocks"], B.shape[0], A.shape[1])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    ranks = blocks.ranks.tolist()
    r = sum(ranks) if r is None else r
    if min(ranks) < 0 or max(ranks) != A.shape[0] or A.shape[0] != B.shape[1] or sum(ranks) != r:
        raise ValueError(f"{name}: ranks must sum to r={r} with a largest rank of {A.shape[0]}, got {ranks}")
    return blocks
