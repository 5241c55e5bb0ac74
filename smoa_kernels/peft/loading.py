"""Checks of an adapter that is being loaded, all of them before the first tensor is copied."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor, nn

from ..definition.sketch import TOLERANCE, sketch_distance
from .layer import SMoALayer
from .layout import STATE_KEYS
from .offload import gathered, present

__all__ = ["check_adapter"]


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
            sketch = layer.check_state(name, adapter_name, given)
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
