"""Reads an adapter's folder from disk, whose files may be damaged or another method's."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..adapter import ALL_KEYS
from ..checks import naming, shown
from ..definition.packed import scaling_tensor
from ..definition.sketch import SKETCH_SIZE
from .format import CONFIG_NAME, HIRA, INFIX, METHOD, PREFIX, WEIGHTS_NAME, StoredAdapter, read_layer
from .settings import AdapterSettings
from .writing import check_seal

# Larger JSON files are not read. The index of a model with hundreds of experts per layer has some 20 MB.
MOST_JSON_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Adapter:
    """The folder of an SMoA adapter, or of a HiRA adapter as SMoA with one block, read and checked."""

    config: dict[str, Any]  # the configuration as its file holds it
    settings: AdapterSettings  # the layers' settings in it
    path: Path  # of the file of weights
    tensors: dict[str, Tensor]  # by key without `PREFIX`; mapped into memory: no value is read yet
    layers: dict[str, StoredAdapter]  # by path in the base model; of experts, the path of the parameter

    @property
    def is_hira(self) -> bool:
        """Whether it is an adapter of HiRA, which has neither labels nor sketches."""
        return bool(self.config["peft_type"] == HIRA)

    @property
    def in_full(self) -> dict[str, Tensor]:
        """Parameters that the file holds in full: biases, and those of modules to save."""
        return {key: own for key, own in self.tensors.items() if INFIX not in key and ".hira_" not in key}


def read_adapter(folder: Path, methods: Sequence[str] = (METHOD,)) -> Adapter:
    """Read the folder of an adapter of one of `methods`, SMoA or HiRA, without PEFT."""
    place = folder / CONFIG_NAME
    if not place.is_file():
        raise FileNotFoundError(f"there is no {CONFIG_NAME} in {folder}: give the folder of a saved adapter")
    config = read_json(place)
    method: Any = config.get("peft_type")
    if method not in methods:
        raise ValueError(f"{place}: an adapter of the method {shown(method)}, not {' or '.join(methods)}")
    path, known = folder / WEIGHTS_NAME, {field.name for field in fields(AdapterSettings)}
    if method == HIRA:
        settings = AdapterSettings(num_blocks=1)  # whose scale is 1
    else:
        with naming(place):
            settings = AdapterSettings(**{key: value for key, value in config.items() if key in known})
    stored = Adapter(config, settings, path, *read_weights(folder, settings, method))
    if not path.is_file():
        raise FileNotFoundError(f"there is no {WEIGHTS_NAME} in {folder}")
    if not stored.layers:
        raise ValueError(f"{path} holds no layer of {'a HiRA' if stored.is_hira else 'an SMoA'} adapter")
    return stored


def read_weights(
    folder: Path, settings: AdapterSettings, method: str = METHOD
) -> tuple[dict[str, Tensor], dict[str, StoredAdapter]]:
    """Read an adapter's tensors and layers, as `Adapter` holds them; empty if there are no weights, or on a hub."""
    path, pickled = folder / WEIGHTS_NAME, folder / "adapter_model.bin"
    if not path.is_file():
        if pickled.is_file():
            raise ValueError(f"{pickled} is a pickle, and adapters are read from safetensors only")
        return {}, {}
    with opened(path) as file:  # mapped into memory: no value is read yet
        tensors = {key.removeprefix(PREFIX): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    with naming(path):
        if method == HIRA:
            return tensors, _hira_layers(tensors)
        layers = {}
        for name in sorted({key.rpartition(INFIX)[0] for key in tensors if INFIX in key}, key=by_number):
            given = {key: tensors.get(f"{name}{INFIX}{key}") for key in ALL_KEYS}
            # The rank decides a layer's memory, so it is compared with the file before any layer is made.
            own = settings.for_layer(name)
            layers[name] = read_layer(name, given, own.r, own.rule.group_size)
    check_seal(folder, settings.weights_sha256)
    for name, layer in layers.items():
        saved, wanted = float(layer.scaling), settings.for_layer(name).scaling
        if not math.isclose(saved, wanted, rel_tol=1e-6):
            raise ValueError(
                f"{path}: {name}: s is {saved} and {CONFIG_NAME} says {wanted}: they must be equal"
            )
    return tensors, layers


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
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def _hira_layers(tensors: dict[str, Tensor]) -> dict[str, StoredAdapter]:
    """The layers of a HiRA adapter of linear layers, as SMoA's with a single block and s = 1."""
    layers = {}
    for key in sorted((key for key in tensors if ".hira_" in key), key=by_number):
        name, _, kind = key.rpartition(".")
        if (embedding := kind.startswith("hira_embedding_")) or tensors[key].ndim != 2:
            what = "an embedding" if embedding else "a convolution"
            raise ValueError(f"{name} is {what}, and only linear layers are read")
        if kind == "hira_A":
            A, B = tensors[key], tensors.get(f"{name}.hira_B")
            if B is None or B.ndim != 2 or B.shape[1] != A.shape[0]:
                raise ValueError(f"{name} has no hira_B that fits its hira_A")
            rows, cols = (torch.zeros(size, dtype=torch.uint8) for size in (B.shape[0], A.shape[1]))
            ranks = torch.tensor([A.shape[0]], dtype=torch.int32)
            sketch, s = torch.full([SKETCH_SIZE], torch.nan), scaling_tensor(1.0, A.device)
            layers[name] = StoredAdapter(A, B, rows, cols, ranks, sketch, s)
    return layers


def by_number(name: str) -> list[tuple[int, str]]:
    """Sorting key of a layer's name that puts layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
