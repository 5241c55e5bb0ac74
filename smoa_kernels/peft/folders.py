"""Reads the folders of adapters and base models from disk: files may be damaged, and no model is built."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..checks import shown
from .file_format import STATE_KEYS, LayerBlocks, StackBlocks, read_blocks

__all__ = [
    "MOST_JSON_BYTES",
    "PREFIX",
    "ModelFolder",
    "by_number",
    "check_weights",
    "opened",
    "read_config",
    "read_json",
    "read_layers",
    "read_state",
    "weights_of",
]

# PEFT puts it before the path of a layer in every key of an adapter's file.
PREFIX = "base_model.model."

# A larger JSON file is not read. The index of a model with hundreds of experts a layer has some 20 MB.
MOST_JSON_BYTES = 64 * 2**20


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        ValueError: the file is larger than `MOST_JSON_BYTES`, which is seen before it is read, or holds something else.
    """
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


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a safetensors file, whose header safetensors checks against the file's length.

    Raises:
        ValueError: the file is truncated, corrupt or cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is truncated or corrupt, no readable safetensors file: {error}") from error


def read_config(folder: Path, methods: Sequence[str]) -> PeftConfig:
    """Read the configuration of an adapter of one of `methods` (PEFT's names).

    Raises:
        FileNotFoundError: the folder has no configuration.
        ValueError: it is another method's, or its values are not allowed. The message names the file.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():  # PEFT would look for it on a hub
        raise FileNotFoundError(f"there is no {CONFIG_NAME} in {folder}: give the folder of a saved adapter")
    method = read_json(path).get("peft_type")
    if method not in methods:
        allowed = " or ".join(str(getattr(name, "value", name)) for name in methods)
        raise ValueError(f"{path}: it is an adapter of the method {shown(method)}, not {allowed}")
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[method].from_pretrained(os.fspath(folder))
    except (
        TypeError,
        ValueError,
    ) as error:  # SMoAConfig's errors name the file already, or that of the weights
        named = any(name in str(error) for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
        raise ValueError(str(error) if named else f"{path}: {error}") from error


def weights_of(folder: Path) -> Path:
    """The path of an adapter's weights; FileNotFoundError where there are none."""
    path = Path(folder, SAFETENSORS_WEIGHTS_NAME)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {SAFETENSORS_WEIGHTS_NAME} in {folder}")
    return path


def read_state(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, mapped into memory; ValueError where it cannot be read."""
    with opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping


def check_weights(folder: str, rank_of: Callable[[str], int]) -> None:
    """Raise unless the weights in `folder` can be read; a folder without weights, or on a hub, passes.

    Raises:
        ValueError: the weights are a pickle, or `read_layers` finds a fault.
    """
    path, pickled = (Path(folder, name) for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
    if path.is_file():
        read_layers(path, rank_of)
    elif pickled.is_file():
        raise ValueError(f"{pickled} is a pickle, and SMoA adapters are read from safetensors only")


def read_layers(path: Path, rank_of: Callable[[str], int]) -> dict[str, LayerBlocks | StackBlocks]:
    """Read blocks, ranks and sketch of every SMoA layer in an adapter's file, by the layer's path in the base model.

    The path of a fused weight of experts is the parameter's.

    Args:
        path: the file.
        rank_of: gives the rank budget that the configuration has for a layer. A layer's memory goes by it, so it is
            compared with the file before any layer is made.

    Raises:
        ValueError: a tensor is missing, or `read_blocks` finds a fault. The message names the file and the layer.
    """
    with opened(path) as file:
        keys = [key for key in file.keys() if ".smoa_" in key]  # noqa: SIM118  # it is no mapping
        state = {key: file.get_tensor(key) for key in keys}  # mapped: the factors' values are not read
    layers = {}
    for stem in sorted({key.rpartition(".")[0] for key in state}):
        name = stem.removeprefix(PREFIX)
        given = {key: state.get(f"{stem}.{key}") for key in STATE_KEYS}
        try:
            layers[name] = read_blocks(name, given, rank_of(name))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return layers


def by_number(name: str) -> list[tuple[int, str]]:
    """Sorting key of a layer's name that puts layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


class ModelFolder:
    """Reads single tensors of a base model's folder.

    Raises:
        ValueError, FileNotFoundError: the folder has no safetensors files, or they cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = dict(self._scan(folder))
        if not self.files:
            raise FileNotFoundError(
                f"there are no safetensors files in {folder}, as save_pretrained writes them; `hf download NAME` "
                "fetches a model and prints its folder"
            )

    @staticmethod
    def _scan(folder: Path) -> Iterator[tuple[str, Path]]:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files = read_json(index).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
                raise ValueError(f"{index} is not an index of safetensors files: it has no weight_map")
            yield from ((name, folder / file) for name, file in files.items())
            return
        single = folder / "model.safetensors"  # what transformers reads, whatever lies beside it
        for path in [single] if single.is_file() else sorted(folder.glob("*.safetensors")):
            with opened(path) as file:
                yield from ((name, path) for name in file.keys())  # noqa: SIM118  # it is no mapping

    def get(self, name: str) -> Tensor | None:
        """Read a tensor; None where the model lacks it."""
        stored = self.stored_name(name)
        if stored is None:
            return None
        with opened(self.files[stored]) as file:
            tensor: Tensor = file.get_tensor(stored)
        return tensor

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Give every tensor by its stored name, file by file; mapped into memory, so that none is read yet."""
        by_file = sorted(self.files, key=lambda name: self.files[name])
        for path, names in itertools.groupby(by_file, key=lambda name: self.files[name]):
            with opened(path) as file:
                for name in names:
                    yield name, file.get_tensor(name)

    def linear_layers(self) -> dict[str, bool]:
        """Name the model's linear layers but its head, as the files do; with each, whether it is stored (C, N).

        Raises:
            ValueError, OSError: transformers does not know the model's configuration.
        """
        from transformers import AutoConfig, AutoModel
        from transformers.pytorch_utils import Conv1D

        if not (self.folder / "config.json").is_file():  # transformers would look for it on a hub
            raise FileNotFoundError(f"there is no config.json in {self.folder}")
        with torch.device("meta"):
            model = AutoModel.from_config(AutoConfig.from_pretrained(os.fspath(self.folder)))
        found = {
            self.stored_name(f"{name}.weight"): isinstance(module, Conv1D)
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D))
        }
        return {name.removesuffix(".weight"): swapped for name, swapped in found.items() if name is not None}

    def stores_swapped(self, name: str, shape: tuple[int, int]) -> bool:
        """Whether a layer's weight W0 of a `shape` (N, C) is stored (C, N): by its shape, or its class where N = C.

        Raises:
            ValueError: the weight is square, and transformers does not know the model's configuration.
        """
        stored = self.stored_name(f"{name}.weight")
        if shape[0] != shape[1]:
            given = None if stored is None else self.get(stored)
            return given is not None and tuple(given.shape) != shape
        try:
            return self._layers.get((stored or "").removesuffix(".weight"), False)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{name}: its weight is square. Whether it is stored transposed, as a Conv1D's is, the model's class "
                f"alone shows, and transformers knows none for {self.folder}: {error}"
            ) from error

    @functools.cached_property
    def _layers(self) -> dict[str, bool]:
        return self.linear_layers()

    def stored_name(self, name: str) -> str | None:
        """The name under which a tensor is stored; None where the model lacks it.

        A model saved without its head may lack the first part of each name, or have one more.
        """
        if name in self.files:
            return name
        shorter = name.partition(".")[2]
        if shorter in self.files:
            return shorter
        longer = [stored for stored in self.files if stored.partition(".")[2] == name]
        return longer[0] if len(longer) == 1 else None
