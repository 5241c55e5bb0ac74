"""Checks an adapter that PEFT loads before its first tensor is copied (transformers' own way: `..replaced`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...definition.sketch import check_base
from ..layer import keys_of, layers_with
from ..offload import gathered, present
from .snapshot import PARAMETER_PREFIX


def check_adapter(
    model: nn.Module, adapter_name: str, state: Mapping[str, Tensor], *, strict_base: bool
) -> None:
    """Raise unless `state`, keyed as the model's own state dict is, fits every SMoA layer of `model`.

    A `state` without any SMoA tensor is left to PEFT, unless layers were just injected for it.

    Raises:
        ValueError: naming the layer: a tensor is missing, corrupt or has another shape, labels or ranks are out of
            range, the model has no such layer, or, where `strict_base`, W0 is another weight than the adapter was
            trained on (else a warning).
    """
    layers = layers_with(model, adapter_name)
    keys = {name: keys_of(name, adapter_name) for name in layers}
    places = {key for of_layer in keys.values() for key in of_layer.values()}
    homeless = [key for key in state if f".{PARAMETER_PREFIX}." in key and key not in places]
    if homeless:
        raise ValueError(
            f"the model has no place for {len(homeless)} tensors of the adapter, for one {homeless[0]}; nothing was "
            "loaded"
        )
    holds_adapter = any(key in places for key in state)
    distances = {}
    for name, layer in layers.items():
        adapter = layer.smoa[adapter_name]
        given: dict[str, Any] = {key: state.get(place) for key, place in keys[name].items()}
        if holds_adapter or not adapter.has_blocks:
            adapter.check_state(name, given)
            if not given["sketch"].is_meta:
                with gathered(layer), present(layer):
                    distances[name] = layer.base_distance(given["sketch"])
    check_base(distances, strict=strict_base)
