"""`hotswap`: replaces a model's adapter by a saved one in place, so that a compiled model stays compiled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from ...adapter_folder.format import CONFIG_NAME, PREFIX
from ...adapter_folder.reading import Adapter, read_adapter
from ...checks import check_path, naming, shown
from ...definition.labels import same_groups
from ..config import SMoAConfig
from ..layer import SMoALayer, keys_of, layers_with
from .loading import check_adapter

# Part of the names of a compiled model's modules.
_COMPILED = "_orig_mod."


def hotswap(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Exchange an adapter of a model for a saved one of the same shape, in place and without compiling anew.

    Factors, labels, scaling, dropout and configuration become those of the folder. `algorithm` and `backend`, which
    say how this model computes, stay. Everything is checked before the first tensor is copied.

    Args:
        model: a model with SMoA adapters, compiled or not; on any devices.
        folder: the adapter, as `save_pretrained` wrote it.
        adapter_name: the adapter of the model that is exchanged.

    Raises:
        TypeError: `folder` is not a path.
        ValueError, FileNotFoundError: the folder is damaged or another method's, or its adapter differs from the
            model's in its layers, ranks, blocks, block sizes, groups or dtype, was trained on another base, or trains
            biases or whole modules; the model has no such adapter, or it is merged or sharded. Nothing was changed.

    Example:
        >>> from peft import get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), SMoAConfig(r=4, target_modules=["0"]))
        >>> model.save_pretrained("adapter")
        >>> hotswap(model, "adapter")
    """
    check_path("folder", folder)
    layers = _layers(model, adapter_name)
    adapter = read_adapter(Path(folder))
    with naming(Path(folder, CONFIG_NAME)):
        config: Any = SMoAConfig.from_peft_type(**adapter.config)  # PEFT's own fields too
    configs: Any = getattr(model, "peft_config", {})
    held = configs.get(adapter_name)
    if adapter.in_full or any(c.bias != "none" or c.modules_to_save for c in (config, held or config)):
        named = f" ({min(adapter.in_full)})" if adapter.in_full else ""
        raise ValueError(
            f"bias and modules_to_save: this adapter or that in {folder} also trains biases or whole modules{named}: "
            "load it with load_adapter"
        )
    # For the model's name of each layer, its path in the base model, as in the file.
    paths = {name: name.replace(_COMPILED, "").removeprefix(PREFIX) for name in layers}
    names = {path: name for name, path in paths.items()}
    # Keyed as the model's state dict is; a layer that the model has not keeps its path.
    state = {
        keys_of(names.get(path, path), adapter_name)[key]: tensor
        for path, layer in adapter.layers.items()
        for key, tensor in layer.tensors().items()
    }
    check_adapter(model, adapter_name, state, strict_base=True, any_scale=True)
    for name, layer in layers.items():
        _check_layer(name, layer, adapter_name, adapter, paths[name])
    for kept in ("algorithm", "backend", "inference_mode") if held is not None else ():
        setattr(config, kept, getattr(held, kept))
    for name, layer in layers.items():
        layer.smoa[adapter_name].overwrite(adapter.layers[paths[name]].tensors())
        layer.settings[adapter_name] = config.for_layer(paths[name])
    if held is not None:
        configs[adapter_name] = config


def _layers(model: nn.Module, adapter_name: str) -> dict[str, SMoALayer]:
    """The model's layers that hold the adapter; none may be merged, sharded or of experts."""
    layers = layers_with(model, adapter_name)
    if not layers:
        raise ValueError(f"adapter_name must name an SMoA adapter of the model, got {shown(adapter_name)}")
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name}: the adapter is merged: unmerge it first")
        if layer._shard is not None:
            raise ValueError(f"{name} is sharded: exchange its adapter before parallelize_module")
        if layer.stack:
            raise ValueError(f"{name}: an adapter of experts cannot be exchanged in place: use load_adapter")
    return layers


def _check_layer(name: str, layer: SMoALayer, adapter_name: str, adapter: Adapter, path: str) -> None:
    """Raise unless a layer's new adapter, of the same shapes, agrees with the old one in all constants of a graph."""
    old, new = layer.smoa[adapter_name], adapter.layers[path]
    if not same_groups(old.col_group, new.col_group):
        raise ValueError(f"{name}: col_group must be the same in the folder and in the model")
    for what, held, given in (
        ("block_ranks", list(old.block_ranks), new.ranks.tolist()),
        ("group_size", old.group_size, new.group_size),
        ("dtype", (old.A.dtype, old.B.dtype), (new.A.dtype, new.B.dtype)),
        ("block sizes, granularity and contiguity", old.partition.sizes(), new.partition.sizes()),
    ):
        if held != given:
            raise ValueError(
                f"{name}: {what} must be the same, got {given} in the folder and {held} in the model"
            )
