"""`hotswap`: replaces a model's adapter by a saved one in place, so that a compiled model stays compiled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from ...adapter_folder.format import STATE_KEYS, LayerBlocks
from ...adapter_folder.reading import PREFIX, Adapter, read_adapter
from ...adapter_folder.settings import LayerSettings
from ...checks import check_path, shown
from ..config import SMoAConfig
from ..layer import SMoALayer, layers_with
from .loading import check_adapter

__all__ = ["hotswap"]

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
            model's in its layers, r, K, block ranks, block sizes or dtype, was trained over another base, or trains
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
    config = SMoAConfig.of_folder(adapter)
    configs: Any = getattr(model, "peft_config", {})
    held = configs.get(adapter_name)
    if adapter.whole or any(each.bias != "none" or each.modules_to_save for each in (config, held or config)):
        named = f" ({min(adapter.whole)})" if adapter.whole else ""
        raise ValueError(
            f"bias and modules_to_save: this adapter or that in {folder} also trains biases or whole modules{named}: "
            "load it with load_adapter"
        )
    # For the model's name of each layer, its path in the base model, as in the file.
    paths = {name: name.replace(_COMPILED, "").removeprefix(PREFIX) for name in layers}
    found = _exchangeable(adapter, set(paths.values()))
    for kept in ("algorithm", "backend", "inference_mode") if held is not None else ():
        setattr(config, kept, getattr(held, kept))
    settings = {name: config.for_layer(path) for name, path in paths.items()}
    given = {name: adapter.of_layer(path) for name, path in paths.items()}
    for name, layer in layers.items():
        _check_layer(name, layer, adapter_name, settings[name], found[paths[name]], given[name])
    as_model = {f"{name}.{key}.{adapter_name}": given[name][key] for name in layers for key in STATE_KEYS}
    check_adapter(model, adapter_name, as_model, strict_base=True)
    for name, layer in layers.items():
        layer.overwrite(adapter_name, given[name], settings[name])
    if held is not None:
        configs[adapter_name] = config


def _layers(model: nn.Module, adapter_name: str) -> dict[str, SMoALayer]:
    """The model's layers that hold the adapter; none may be merged or sharded."""
    layers = layers_with(model, adapter_name)
    if not layers:
        raise ValueError(f"adapter_name must name an SMoA adapter of the model, got {shown(adapter_name)}")
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name}: the adapter is merged: unmerge it first")
        if layer._shard is not None:
            raise ValueError(f"{name} is sharded: exchange its adapter before parallelize_module")
    return layers


def _exchangeable(adapter: Adapter, held: set[str]) -> dict[str, LayerBlocks]:
    """The folder's layers, after checking that they are those of the model's adapter."""
    found = {}
    for name, blocks in adapter.layers.items():
        if not isinstance(blocks, LayerBlocks):
            raise ValueError(f"{name}: an adapter of experts cannot be exchanged in place: use load_adapter")
        found[name] = blocks
    if held != found.keys():
        name = min(held ^ found.keys())
        which = "the model's adapter only" if name in held else "the file only"
        raise ValueError(
            f"target_modules: {adapter.path} has another set of layers than the model's adapter ({len(found)} and "
            f"{len(held)}); {name}, for one, is in {which}"
        )
    return found


def _check_layer(
    name: str,
    layer: SMoALayer,
    adapter_name: str,
    settings: LayerSettings,
    blocks: LayerBlocks,
    given: dict[str, Any],
) -> None:
    """Raise unless a layer's new adapter agrees with the old one in all that a compiled graph has baked in."""
    own, new = layer.partition(adapter_name), blocks.partition
    A, B = layer.smoa_A[adapter_name], layer.smoa_B[adapter_name]
    for what, held, found in (
        ("(out_features, in_features)", own.shape, new.shape),
        ("r", layer.r[adapter_name], settings.r),
        ("num_blocks", own.num_blocks, new.num_blocks),
        ("block_ranks", layer.ranks(adapter_name).tolist(), blocks.ranks.tolist()),
        ("dtype", (A.dtype, B.dtype), (given["smoa_A"].dtype, given["smoa_B"].dtype)),
        ("block sizes, granularity and contiguity", own.sizes(), new.sizes()),
    ):
        if held != found:
            raise ValueError(
                f"{name}: {what} must be the same, got {found} in the folder and {held} in the model"
            )
