"""Reads an adapter's folder from disk, whose files may be damaged or another method's."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checks import naming, shown
from .format import (
    CONFIG_NAME,
    HIRA,
    METHOD,
    PREFIX,
    STATE_KEYS,
    WEIGHTS_NAME,
    LayerBlocks,
    read_blocks,
)
from .settings import AdapterSettings
from .writing import check_seal

# Larger JSON files are not read. The index of a model with hundreds of experts per layer has some 20 MB.
MOST_JSON_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Adapter:
    """An SMoA adapter's folder, read and checked.

    Attributes:
        config: the configuration as its file holds it.
        settings: the layers' settings in it.
        path: the file of weights.
        tensors: its tensors by key without `PREFIX`; mapped into memory, so the factors' values are not read yet.
        layers: blocks, ranks and sketch of every layer, by its path in the base model. The path of a fused weight of
            experts is the parameter's.
    """

    config: dict[str, Any]
    settings: AdapterSettings
    path: Path
    tensors: dict[str, Tensor]
    layers: dict[str, LayerBlocks]

    def of_layer(self, name: str) -> dict[str, Tensor]:
        """A layer's tensors by `STATE_KEYS`."""
        return {key: self.tensors[f"{name}.{key}"] for key in STATE_KEYS}

    @property
    def whole(self) -> dict[str, Tensor]:
        """Parameters that the file holds in full: biases, and those of modules to save."""
        return {key: tensor for key, tensor in self.tensors.items() if ".smoa_" not in key}


def read_adapter(folder: Path) -> Adapter:
    """Read the folder of an SMoA adapter, without PEFT."""
    config = read_config(folder, (METHOD,))
    known = {field.name for field in fields(AdapterSettings)}
    with naming(folder / CONFIG_NAME):
        settings = AdapterSettings(**{key: value for key, value in config.items() if key in known})
    tensors, layers = read_weights(folder, settings)
    path = weights_of(folder)
    if not layers:
        raise ValueError(f"{path} holds no layer of an SMoA adapter")
    return Adapter(config, settings, path, tensors, layers)


def read_config(folder: Path, methods: Sequence[str]) -> dict[str, Any]:
    """Read the configuration of an adapter of one of `methods` (PEFT's names)."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"there is no {CONFIG_NAME} in {folder}: give the folder of a saved adapter")
    config = read_json(path)
    method = config.get("peft_type")
    if method not in methods:
        raise ValueError(
            f"{path}: it is an adapter of the method {shown(method)}, not {' or '.join(methods)}"
        )
    return config


def read_weights(folder: Path, settings: AdapterSettings) -> tuple[dict[str, Tensor], dict[str, LayerBlocks]]:
    """Read an adapter's tensors and layers, as `Adapter` holds them; empty if there are no weights, or on a hub."""
    path, pickled = folder / WEIGHTS_NAME, folder / "adapter_model.bin"
    if not path.is_file():
        if pickled.is_file():
            raise ValueError(f"{pickled} is a pickle, and SMoA adapters are read from safetensors only")
        return {}, {}
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in read_state(path).items()}
    layers = {}
    for name in sorted({key.rpartition(".")[0] for key in tensors if ".smoa_" in key}, key=by_number):
        given = {key: tensors.get(f"{name}.{key}") for key in STATE_KEYS}
        with naming(path):
            # The rank decides a layer's memory, so it is compared with the file before any layer is made.
            layers[name] = read_blocks(name, given, settings.for_layer(name).r)
    check_seal(folder, settings.weights_sha256)
    return tensors, layers


def weights_of(folder: Path) -> Path:
    """The path of an adapter's weights; FileNotFoundError if there are none."""
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"there is no {WEIGHTS_NAME} in {folder}")
    return path


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped into memory: no value is read yet."""
    with opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a safetensors file; safetensors checks its header against its length."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is truncated or corrupt, no readable safetensors file: {error}") from error


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the object in a JSON file."""
    size = Path(path).stat().st_size
    if size > MOST_JSON_BYTES:
        raise ValueError(f"{path} has {size} bytes; at most {MOST_JSON_BYTES} are read")
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def read_hira(folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Read the folder of a HiRA adapter of linear layers, without PEFT.

    Returns:
        A (r, C) and B (N, r) of each layer by its path in the base model, and the other tensors by key without
        `PREFIX`.
    """
    read_config(folder, (HIRA,))
    path = weights_of(folder)
    state = {key.removeprefix(PREFIX): tensor for key, tensor in read_state(path).items()}
    layers = {}
    for key, tensor in state.items():
        name, _, kind = key.rpartition(".")
        if kind.startswith("hira_embedding_"):
            raise ValueError(f"{path}: {name} is an embedding, and only linear layers are read")
        if kind.startswith("hira_") and tensor.ndim != 2:
            raise ValueError(f"{path}: {name} is a convolution, and only linear layers are read")
        if kind == "hira_A":
            other = state.get(f"{name}.hira_B")
            if other is None or other.ndim != 2 or other.shape[1] != tensor.shape[0]:
                raise ValueError(f"{path}: {name} has no hira_B that fits its hira_A")
            layers[name] = tensor, other
    if not layers:
        raise ValueError(f"{path} holds no layer of a HiRA adapter")
    whole = {key: tensor for key, tensor in state.items() if ".hira_" not in key}
    return {name: layers[name] for name in sorted(layers, key=by_number)}, whole


def by_number(name: str) -> list[tuple[int, str]]:
    """Sorting key of a layer's name that puts layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
