"""Checks an adapter that PEFT loads before its first tensor is copied, and undoes an injection that failed.

transformers' own way of loading is in `..replaced`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from peft.tuners.tuners_utils import delete_adapter
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ...adapter_folder.format import INFIX, PREFIX
from ...definition.sketch import check_base
from ..experts.experts import Experts
from ..layer import SMoALayer, keys_of, layers_with
from ..modulated import AdaptedModule
from ..offload import gathered, present

# PEFT and transformers recognise our adapters' parameters by this prefix: they are named `<layer>.smoa.<adapter>.A`.
# When transformers loads `<layer>.smoa.A` from a file, it puts the adapter's name behind the part of the key that
# starts with the prefix. With a dot in the prefix it would put the name at the key's end.
PARAMETER_PREFIX = "smoa"

# Classes of the modules by which an injection replaces others.
_PUT_IN = (SMoALayer, AdaptedModule, AuxiliaryTrainingWrapper)


class Snapshot:
    """The parts of a model, the base or PEFT's around it, that an injection of the configuration `new` changes."""

    def __init__(self, model: nn.Module, new: Any = None) -> None:
        self.model = model
        self._children = [(module, dict(module._modules)) for module in model.modules()]
        self._trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._had_configs, configs = hasattr(model, "peft_config"), getattr(model, "peft_config", {})
        self._configs = {name: held for name, held in configs.items() if held is not new}

    def restore(self, adapter_name: str) -> None:
        """Remove a new adapter; its injection may have failed at any point."""
        for module, children in self._children:
            for name, child in children.items():
                now = module._modules.get(name)
                if now is not child and isinstance(now, _PUT_IN):
                    setattr(module, name, child)
            if isinstance(module, Experts):
                for name in module._modules.keys() - children.keys():
                    delattr(module, name)
        delete_adapter(self.model, adapter_name, prefix=PARAMETER_PREFIX, layer_cls=SMoALayer)
        for parameter, before in self._trainable:
            parameter.requires_grad_(before)
        configs: Any = getattr(self.model, "peft_config", {})
        configs.pop(adapter_name, None)
        if adapter_name in self._configs:
            configs[adapter_name] = self._configs[adapter_name]
        if not (configs or self._had_configs) and "peft_config" in vars(self.model):
            del self.model.peft_config


def name_groups(model: nn.Module, adapter_name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the groups of columns in a file the keys that they will have in the model, whose adapter has none yet."""
    places = {
        f"{name}{INFIX}col_group": keys_of(name, adapter_name)["col_group"]
        for name in layers_with(model, adapter_name)
    }
    return {places.get(key, places.get(key.removeprefix(PREFIX), key)): own for key, own in state.items()}


def check_adapter(
    model: nn.Module,
    adapter_name: str,
    state: Mapping[str, Tensor],
    *,
    strict_base: bool,
    any_scale: bool = False,
) -> None:
    """Raise unless `state`, keyed as the model's own state dict is, fits every SMoA layer of `model`.

    A `state` without any SMoA tensor is left to PEFT, unless layers were just injected for it.

    Raises:
        ValueError: naming the layer: a tensor is missing, corrupt or has another shape, labels or ranks are out of
            range, s is another than the model's configuration says (unless `any_scale`), the model has no such layer,
            or, where `strict_base`, W0 is another weight than the adapter was trained on (else a warning).
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
            if not any_scale:
                check_scale(name, given["scaling"], layer.settings[adapter_name].scaling)
            if not given["sketch"].is_meta:
                with gathered(layer), present(layer):
                    distances[name] = layer.base_distance(given["sketch"])
    check_base(distances, strict=strict_base)


def check_scale(name: str, s: Tensor, configured: float) -> None:
    """Raise unless a file's s is nearly that of the layer's settings, which the next save would write.

    With `use_lora_rate` s depends on W0: over a base of another precision it differs, by about 1 % over FP4.
    """
    if not (s.is_meta or math.isclose(float(s), configured, rel_tol=0.05)):
        raise ValueError(
            f"{name}: s is {float(s):.6g} in the file and {configured:.6g} by the model's configuration: load it under "
            "another adapter name, or configure smoa_alpha and use_lora_rate as it was saved; nothing was loaded"
        )
