"""Checks an adapter that PEFT or transformers loads, and removes it again if it does not fit.

PEFT's loading calls the configuration and the tuner, which check before the first tensor is copied. If PEFT itself
cannot read a configuration, the error names the file. transformers' own `load_adapter` calls neither, so the folder is
checked before it runs and the adapter once it is in the model.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...adapter_folder.format import CONFIG_NAME, METHOD
from ...adapter_folder.reading import read_json
from ...definition.sketch import check_base
from ..config import SMoAConfig
from ..layer import keys_of, layers_with
from ..offload import gathered, present
from ..snapshot import PARAMETER_PREFIX, Snapshot


def check_adapter(
    model: nn.Module, adapter_name: str, state: Mapping[str, Tensor], *, strict_base: bool
) -> None:
    """Raise unless `state`, keyed as the model's own state dict is, fits every SMoA layer of `model`.

    A `state` without any SMoA tensor is left to PEFT, unless layers were just injected for it.

    Raises:
        ValueError: naming the layer: a tensor is missing, corrupt or has another shape, labels or ranks are out of
            range, the model has no such layer, or, where `strict_base`, W0 is another weight than the adapter was
            trained over (else a warning).
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


def named_read(read: Any) -> Any:
    """Wrap PEFT's reader of configurations, which reads the file before it knows the method."""

    @classmethod  # type: ignore[misc]  # of PEFT's class
    @functools.wraps(read.__func__)
    def from_json_file(cls: Any, path_json_file: Any, **kwargs: Any) -> Any:
        if isinstance(path_json_file, (str, os.PathLike)):  # a descriptor can be read once only
            read_json(path_json_file)  # its error names the file and the fault
        return read.__func__(cls, path_json_file, **kwargs)

    return from_json_file


def checked_load(load: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap transformers' `load_adapter`; adapters of other methods load as before."""

    @functools.wraps(load)
    def load_adapter(self: Any, peft_model_id: str | None = None, *args: Any, **kwargs: Any) -> Any:
        if peft_model_id is not None:
            folder = Path(peft_model_id, (kwargs.get("adapter_kwargs") or {}).get("subfolder") or "")
            config = folder / CONFIG_NAME
            if config.is_file() and read_json(config).get("peft_type") == METHOD:
                SMoAConfig.from_pretrained(str(folder))  # checks all that needs no model
        known, had_adapters, before = set(_adapters(self)), self._hf_peft_config_loaded, Snapshot(self)
        try:
            found = load(self, peft_model_id, *args, **kwargs)
            for name in set(_adapters(self)) - known:
                state = {key: value for key, value in self.state_dict().items() if f".{name}." in key}
                for key in found.missing_keys:
                    state.pop(key, None)
                state |= dict.fromkeys(found.unexpected_keys)
                check_adapter(self, name, state, strict_base=self.peft_config[name].strict_base)
        except BaseException:  # Ctrl-C too
            for name in set(_adapters(self)) - known:
                before.restore(name)
                self._hf_peft_config_loaded = had_adapters
            raise
        return found

    return load_adapter


def _adapters(model: Any) -> list[str]:
    configs = getattr(model, "peft_config", {})
    return [name for name in configs if configs[name].peft_type == METHOD]
