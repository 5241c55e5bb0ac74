"""Converts adapter folders between PEFT's HiRA and SMoA with one block, which are the same factors.

<path>.hira_A  (r, C)    <path>.smoa_A
<path>.hira_B  (N, r)    <path>.smoa_B, beside it <path>.smoa_blocks
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import HiraConfig
from safetensors.torch import save_file
from torch import Tensor

from ...adapter_folder.base_model import BaseModel
from ...adapter_folder.format import CONFIG_NAME, HIRA, METHOD, PREFIX, WEIGHTS_NAME, pack_blocks
from ...adapter_folder.reading import read_adapter, read_config
from ...adapter_folder.settings import whole_name
from ...adapter_folder.writing import replacing, seal
from ...checks import check_path, naming
from ...definition.sketch import sketch_weight
from ..config import SMoAConfig

# Fields that mean the same in both configurations.
_SHARED = (
    *("r", "target_modules", "exclude_modules", "fan_in_fan_out", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"),
)


def convert_adapter(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Convert a HiRA folder by :func:`hira_to_smoa`, an SMoA folder by :func:`smoa_to_hira`.

    Args:
        folder: the adapter, as `save_pretrained` wrote it.
        out: another folder, made where there is none.
        base: folder of the base model; used where `folder` is HiRA's.
        progress: as for :func:`hira_to_smoa`.

    Returns:
        "SMoA" or "HiRA", the method of the written folder.

    Raises:
        TypeError, ValueError, FileNotFoundError: as these functions do, or the folder is another method's.

    Example:
        >>> from peft import HiraConfig, get_peft_model
        >>> from torch import nn
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), SMoAConfig(num_blocks=1, target_modules=["0"]))
        >>> model.save_pretrained("adapter")
        >>> convert_adapter("adapter", "hira")
        'HiRA'
    """
    check_path("folder", folder)
    if read_config(Path(folder), (HIRA, METHOD))["peft_type"] == METHOD:
        smoa_to_hira(folder, out)
        return "HiRA"
    hira_to_smoa(folder, out, base, progress)
    return "SMoA"


def hira_to_smoa(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write a HiRA adapter as an SMoA adapter with one block and scale 1; its factors stay, bit for bit.

    Args:
        folder: the HiRA adapter.
        out: another folder, made where there is none.
        base: folder of the base model, whose weights are sketched for `smoa_blocks`; the one that the adapter's
            configuration names when None.
        progress: called with the number of finished layers, and of all layers.

    Raises:
        TypeError: an argument is not a path.
        ValueError, FileNotFoundError: a file is missing or cannot be read, the adapter holds layers that SMoA cannot
            adapt (embeddings, convolutions), or the base lacks a layer. Nothing was written.
    """
    source, target = _places(folder, out)
    adapter = read_adapter(source, (HIRA,))
    with naming(source / CONFIG_NAME):
        config = HiraConfig.from_pretrained(os.fspath(source))
    bases = BaseModel(_base_folder(base, config))
    ranks = {name: int(blocks.ranks) for name, blocks in adapter.layers.items()}
    settings = {
        **{name: getattr(config, name) for name in _SHARED},
        "num_blocks": 1,
        "block_order": "contiguous",
        "smoa_dropout": config.hira_dropout,
        "init_weights": config.init_weights is not False,
        # Ranks are those in the file: PEFT 0.21.2 gives every plain layer r and ignores rank_pattern.
        "rank_pattern": {whole_name(name): r for name, r in ranks.items() if r != config.r},
    }
    state = dict(adapter.tensors)
    for done, (name, blocks) in enumerate(adapter.layers.items()):
        progress(done, len(ranks))
        sketch = sketch_weight(_base_weight(bases, name, blocks.partition.shape))
        state[f"{name}.smoa_blocks"] = pack_blocks(blocks.partition, blocks.ranks, sketch)
    _write(target, SMoAConfig(**settings), state)


def smoa_to_hira(folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Write an SMoA adapter with one block as a HiRA adapter.

    If the scale s is 1, the factors stay, bit for bit. HiRA has no other scale, so s is multiplied into B. Settings
    that change no result (`algorithm`, `backend`, `strict_base`) and the sketch of W0 are left out.

    Args:
        folder: the SMoA adapter.
        out: another folder, made where there is none.

    Raises:
        TypeError: an argument is not a path.
        ValueError, FileNotFoundError: a file is missing or cannot be read, or HiRA has no counterpart: for more than
            one block, ranks that differ, or biases. Nothing was written.
    """
    source, target = _places(folder, out)
    adapter = read_adapter(source)
    config = adapter.settings
    if config.bias != "none":
        raise ValueError(f"{source}: bias={config.bias!r} has no counterpart in HiRA, which trains no biases")
    for name, blocks in adapter.layers.items():
        if blocks.of_experts:
            raise ValueError(f"{name}: experts have no counterpart in HiRA, which adapts linear layers")
        rank = int(blocks.ranks.sum())
        if blocks.partition.num_blocks != 1:
            raise ValueError(
                f"{name}: num_blocks={blocks.partition.num_blocks} has no counterpart in HiRA, which has one block"
            )
        if rank != config.r:
            raise ValueError(
                f"{name}: the rank {rank} beside r={config.r} has no counterpart in HiRA: PEFT gives every plain layer "
                "the same rank, whatever rank_pattern says"
            )
    settings = {
        **{name: adapter.config[name] for name in _SHARED if name in adapter.config},
        "r": config.r,
        "hira_dropout": config.smoa_dropout,
        "init_weights": config.init_weights,
    }
    state = adapter.whole
    for name in adapter.layers:
        factors = adapter.of_layer(name)
        state[f"{name}.hira_A"] = factors["smoa_A"]
        state[f"{name}.hira_B"] = factors["smoa_B"] * config.for_layer(name).scaling
    with naming(source / CONFIG_NAME):
        hira = HiraConfig(**settings)
    _write(target, hira, state)


def _places(folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> tuple[Path, Path]:
    check_path("folder", folder)
    check_path("out", out)
    source, target = Path(folder), Path(out)
    if target.exists() and (not target.is_dir() or target.samefile(source)):
        raise ValueError(f"out must be another folder than the adapter's, got {target}")
    return source, target


def _base_folder(base: str | os.PathLike[str] | None, config: Any) -> Path:
    if base is not None:
        check_path("base", base)
        return Path(base)
    named = config.base_model_name_or_path
    if named is None or not Path(named).is_dir():
        raise ValueError(
            f"base must be given: the adapter names {named!r}, which is no folder, as its base model, and an SMoA "
            "adapter holds a sketch of its base weights"
        )
    return Path(named)


def _base_weight(bases: BaseModel, name: str, shape: tuple[int, int]) -> Tensor:
    stored = bases.get(f"{name}.weight")
    if stored is not None and tuple(stored.shape) in (shape, shape[::-1]):
        # fan_in_fan_out is not used: PEFT corrects it for each layer by the layer's class.
        return stored.T if bases.stores_swapped(name, shape) else stored
    raise ValueError(f"the base model in {bases.folder} lacks {name}.weight in the shape {shape}")


def _write(folder: Path, config: Any, state: Mapping[str, Tensor]) -> None:
    with replacing(folder) as scratch:
        tensors = {PREFIX + key: tensor.contiguous() for key, tensor in state.items()}
        save_file(tensors, scratch / WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(scratch))
        seal(scratch)
