"""Converts adapter folders between PEFT's HiRA and SMoA with one block, which are the same factors.

<path>.hira_A  (r, C)    <path>.smoa.A
<path>.hira_B  (N, r)    <path>.smoa.B, beside it the labels of a single block, the rank, the sketch and s = 1
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import HiraConfig
from safetensors.torch import save_file
from torch import Tensor

from ...adapter_folder.base_model import BaseModel
from ...adapter_folder.format import CONFIG_NAME, HIRA, INFIX, METHOD, PREFIX, WEIGHTS_NAME
from ...adapter_folder.reading import Adapter, read_adapter
from ...adapter_folder.settings import full_name
from ...adapter_folder.writing import replacing, seal
from ...checks import check_new, check_path, naming
from ...definition.sketch import sketch_weight
from ..config import SMoAConfig

# Fields that mean the same in both configurations.
_SHARED = (
    *("r", "target_modules", "exclude_modules", "fan_in_fan_out", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"),
)
Progress = Callable[[int, int], None]


def convert_adapter(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    progress: Progress = lambda done, total: None,
) -> str:
    """Write a HiRA adapter as an SMoA adapter with one block and scale 1, or an SMoA adapter with one block as HiRA.

    Factors stay, bit for bit. HiRA has no scale, so another s than 1 is multiplied into B. SMoA's settings that change
    no result (`algorithm`, `backend`, `strict_base`) and the sketch of W0 have no counterpart in HiRA.

    Args:
        folder: the adapter, as `save_pretrained` wrote it.
        out: a new or an empty folder.
        base: folder of the base model; the one that the adapter names when None. It is read to sketch its weights for
            SMoA, and for the shapes of convolutions and embeddings, to HiRA.
        progress: called with the number of sketched layers, and of all layers.

    Returns:
        "SMoA" or "HiRA", the method of the written folder.

    Raises:
        TypeError: an argument is not a path.
        ValueError, FileNotFoundError: a file is missing or cannot be read, the base lacks a layer, or there is no
            counterpart, such as more than one block, ranks that differ, experts and biases; or a HiRA adapter of
            layers that are not linear. Nothing was written.

    Example:
        >>> from peft import HiraConfig, get_peft_model
        >>> from torch import nn
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), SMoAConfig(num_blocks=1, target_modules=["0"]))
        >>> model.save_pretrained("adapter")
        >>> convert_adapter("adapter", "hira")
        'HiRA'
    """
    check_path("folder", folder)
    check_path("out", out)
    source, target = Path(folder), Path(out)
    check_new("out", target)
    adapter = read_adapter(source, (HIRA, METHOD))
    settings = {name: adapter.config[name] for name in _SHARED if name in adapter.config}
    config, state = (
        _to_smoa(adapter, settings, base, progress) if adapter.is_hira else _to_hira(adapter, settings, base)
    )
    with replacing(target) as scratch:
        tensors = {PREFIX + key: tensor.contiguous() for key, tensor in state.items()}
        save_file(tensors, scratch / WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(scratch))
        seal(scratch)
    return "SMoA" if adapter.is_hira else "HiRA"


def _to_smoa(
    adapter: Adapter, settings: dict[str, Any], base: str | os.PathLike[str] | None, progress: Progress
) -> tuple[SMoAConfig, dict[str, Tensor]]:
    with naming(adapter.path.with_name(CONFIG_NAME)):
        own = {
            name: adapter.config[name] for name in ("hira_dropout", "init_weights") if name in adapter.config
        }
        given = HiraConfig(**settings, **own)
    state = adapter.in_full
    bases = _base_model(adapter, base, "an SMoA adapter holds a sketch of its base weights")
    for done, (name, layer) in enumerate(adapter.layers.items()):
        progress(done, len(adapter.layers))
        stored, shape = bases.get(f"{name}.weight"), layer.shape
        if stored is None or tuple(stored.shape) not in (shape, shape[::-1]):
            raise ValueError(f"the base model in {bases.folder} lacks {name}.weight in the shape {shape}")
        # fan_in_fan_out is not used: PEFT corrects it for each layer by the layer's class.
        W0 = stored.T if bases.stores_swapped(name, shape) else stored
        tensors = {**layer.tensors(), "sketch": sketch_weight(W0)}
        state |= {f"{name}{INFIX}{key}": tensor for key, tensor in tensors.items()}
    # Ranks are those in the file: PEFT 0.21.2 gives every plain layer r and ignores rank_pattern.
    ranks = {full_name(name): int(layer.ranks) for name, layer in adapter.layers.items()}
    config = SMoAConfig(
        **settings,
        num_blocks=1,
        block_order="contiguous",
        smoa_dropout=given.hira_dropout,
        init_weights=given.init_weights is not False,
        rank_pattern={name: r for name, r in ranks.items() if r != given.r},
    )
    return config, state


def _base_model(adapter: Adapter, base: str | os.PathLike[str] | None, why: str) -> BaseModel:
    folder: Any = adapter.config.get("base_model_name_or_path") if base is None else base
    if base is None and (folder is None or not Path(folder).is_dir()):
        raise ValueError(
            f"base must be given: the adapter names {folder!r}, which is no folder, as its base model, and {why}"
        )
    check_path("base", folder)
    return BaseModel(Path(folder))


def _to_hira(
    adapter: Adapter, settings: dict[str, Any], base: str | os.PathLike[str] | None
) -> tuple[HiraConfig, dict[str, Tensor]]:
    config, state, not_linear = adapter.settings, adapter.in_full, adapter.settings.not_linear or ()
    bases: BaseModel | None = None
    if config.bias != "none":
        raise ValueError(f"bias={config.bias!r} has no counterpart in HiRA, which trains no biases")
    for name, layer in adapter.layers.items():
        if layer.of_experts:
            raise ValueError(f"{name}: experts have no counterpart in HiRA, which adapts linear layers")
        if len(layer.ranks) != 1:
            raise ValueError(
                f"{name}: num_blocks={len(layer.ranks)} has no counterpart in HiRA, which has one block"
            )
        if (rank := int(layer.ranks)) != config.r:
            raise ValueError(
                f"{name}: the rank {rank} beside r={config.r} has no counterpart in HiRA: PEFT gives every plain layer "
                "the same rank, whatever rank_pattern says"
            )
        A, B = layer.wide_A, layer.B * float(layer.scaling)
        infix = ""
        if name in not_linear:
            why = f"{name} is not linear: HiRA's factors have shapes of the base weight"
            bases = bases or _base_model(adapter, base, why)
            W0 = bases.get(f"{name}.weight")
            if W0 is None or tuple(W0.flatten(1).shape) != layer.shape:
                raise ValueError(
                    f"the base model in {bases.folder} lacks {name}.weight of {layer.shape}: of layers that are not "
                    "linear HiRA adapts convolutions and embeddings"
                )
            if W0.ndim == 2:
                infix, A, B = "embedding_", B.T, A.T
            else:
                A, B = A.view(-1, *W0.shape[1:]), B.view(*B.shape, *[1] * (W0.ndim - 2))
        state |= {f"{name}.hira_{infix}A": A, f"{name}.hira_{infix}B": B}
    settings |= {"r": config.r, "hira_dropout": config.smoa_dropout, "init_weights": config.init_weights}
    with naming(adapter.path.with_name(CONFIG_NAME)):
        return HiraConfig(**settings), state
