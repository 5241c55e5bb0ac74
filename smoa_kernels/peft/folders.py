"""What lies in folders of adapters and base models, read with suspicion and without building either."""

from __future__ import annotations

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
from .layout import STATE_KEYS, LayerBlocks, read_blocks
from .peft_type import PEFT_TYPE

__all__ = [
    "MOST_BYTES",
    "PREFIX",
    "ModelFolder",
    "by_number",
    "check_weights",
    "excess",
    "is_smoa",
    "opened",
    "read_config",
    "read_json",
    "read_layers",
    "read_state",
    "weights_of",
]

# PEFT's, before the path of a layer in every key of an adapter's file.
PREFIX = "base_model.model."


# Of an adapter's configuration: eight thousand modules, each with its rank, are shorter. `SMoAConfig` asks for less.
MOST_BYTES = 2**20
# Of an index of weights, which names every one of them.
MOST_INDEX_BYTES = 64 * 2**20
# Python makes up to 110 bytes of an object of three characters: a file may hold one value for each 64 bytes that its
# kind may have at most.
_BYTES_A_VALUE = 64


def _spelled(word: str) -> str:
    """A regular expression of the JSON strings that are `word`: each character itself or escaped."""
    return '"' + "".join(rf"(?:{char}|\\u(?i:{ord(char):04x}))" for char in word) + '"'


_METHOD_NAMED = re.compile(rf"{_spelled('peft_type')}\s*:\s*{_spelled(PEFT_TYPE.value)}".encode())


def is_smoa(path: str | os.PathLike[str]) -> bool:
    """Whether a file says anywhere that it is the configuration of an SMoA adapter, in no more memory than the file.

    Raises:
        OSError: it cannot be read.
    """
    return _METHOD_NAMED.search(Path(path).read_bytes()) is not None


def read_json(path: str | os.PathLike[str], most: int = MOST_BYTES) -> dict[str, Any]:
    """The object in a JSON file of at most so many bytes. Reading it takes at most twice the file and 8 times `most`.

    Raises:
        ValueError: it holds something else, or is longer, or would make more objects than such a file has, which is
            seen before it is read or they are made.
    """
    size = Path(path).stat().st_size
    if size > most:
        raise ValueError(f"{path} has {_bytes_beyond(size, most)}")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if words := excess(text, most):
        raise ValueError(f"{path} has {words}")
    try:
        found = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def excess(text: str, most: int) -> str:
    """What there is too much of in the JSON `text` of a file of at most so many bytes; "" where nothing is."""
    size, values = len(text.encode()), sum(map(text.count, ",:[{"))
    if size > most:
        return _bytes_beyond(size, most)
    if values > most // _BYTES_A_VALUE:
        return f"{values} values, more than any such file ({most // _BYTES_A_VALUE})"
    return ""


def _bytes_beyond(size: int, most: int) -> str:
    return f"{size} bytes, more than any such file ({most})"


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """A safetensors file, whose header has been checked against its length.

    Raises:
        ValueError: it is truncated, corrupt or cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is truncated or corrupt, no readable safetensors file: {error}") from error


def read_config(folder: Path, methods: Sequence[str]) -> PeftConfig:
    """The configuration of an adapter of one of `methods`, as PEFT names them.

    Raises:
        ValueError, FileNotFoundError: naming the file; there is none, it is another method's, or it is wrong.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():  # PEFT would look for it on a hub
        raise FileNotFoundError(f"there is no {CONFIG_NAME} in {folder}")
    method = read_json(path).get("peft_type")
    if method not in methods:
        allowed = " or ".join(str(getattr(name, "value", name)) for name in methods)
        raise ValueError(f"{path}: it is an adapter of the method {shown(method)}, not {allowed}")
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[method].from_pretrained(os.fspath(folder))
    except (TypeError, ValueError) as error:  # SMoA's names the file, which may be that of the weights
        named = any(name in str(error) for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
        raise ValueError(str(error) if named else f"{path}: {error}") from error


def weights_of(folder: Path) -> Path:
    """The file of an adapter's weights.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(folder, SAFETENSORS_WEIGHTS_NAME)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {SAFETENSORS_WEIGHTS_NAME} in {folder}")
    return path


def read_state(path: Path) -> dict[str, Tensor]:
    """All tensors in a safetensors file. Their values are mapped, not read.

    Raises:
        ValueError: it is no safetensors file.
    """
    with opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping


def check_weights(folder: str, rank_of: Callable[[str], int]) -> None:
    """Whether the weights in `folder` are what `read_layers` can read.

    A folder without weights, or one that is on a hub, is not looked at.

    Raises:
        ValueError: the weights are a pickle, or what `read_layers` finds wrong.
    """
    path, pickled = (Path(folder, name) for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
    if path.is_file():
        read_layers(path, rank_of)
    elif pickled.is_file():
        raise ValueError(f"{pickled} is a pickle, and SMoA adapters are read from safetensors only")


def read_layers(path: Path, rank_of: Callable[[str], int]) -> dict[str, LayerBlocks]:
    """Blocks, ranks and sketch of every SMoA layer in a file of weights, by the layer's path in the base model.

    Args:
        path: of the file.
        rank_of: the rank budget that the configuration gives a layer. Layers take memory by it, so it is compared
            before there are any.

    Raises:
        ValueError: naming the file and the layer, what is missing or what `read_blocks` finds wrong.
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
    """Sorts layer 10 behind layer 9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


class ModelFolder:
    """Tensors of a model folder by name, read one at a time.

    Raises:
        ValueError, FileNotFoundError: there are no safetensors files, or they cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = dict(self._scan(folder))
        if not self.files:
            raise FileNotFoundError(f"there are no safetensors files in {folder}")

    @staticmethod
    def _scan(folder: Path) -> Iterator[tuple[str, Path]]:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files = read_json(index, MOST_INDEX_BYTES).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
                raise ValueError(f"{index} is not an index of safetensors files: it has no weight_map")
            yield from ((name, folder / file) for name, file in files.items())
            return
        for path in sorted(folder.glob("*.safetensors")):
            with opened(path) as file:
                yield from ((name, path) for name in file.keys())  # noqa: SIM118  # it is no mapping

    def get(self, name: str) -> Tensor | None:
        """The tensor `name`. A model without its head was saved without, or with, the first part of each name."""
        stored = self._stored(name)
        if stored is None:
            return None
        with opened(self.files[stored]) as file:
            tensor: Tensor = file.get_tensor(stored)
        return tensor

    def linear_layers(self) -> dict[str, bool]:
        """Linear layers of the model without its head, as its files name them; whether they are stored (C, N).

        Raises:
            ValueError, OSError: transformers finds no configuration that it knows.
        """
        from transformers import AutoConfig, AutoModel
        from transformers.pytorch_utils import Conv1D

        if not (self.folder / "config.json").is_file():  # transformers would look for it on a hub
            raise FileNotFoundError(f"there is no config.json in {self.folder}")
        with torch.device("meta"):
            model = AutoModel.from_config(AutoConfig.from_pretrained(os.fspath(self.folder)))
        found = {
            self._stored(f"{name}.weight"): isinstance(module, Conv1D)
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D))
        }
        return {name.removesuffix(".weight"): swapped for name, swapped in found.items() if name is not None}

    def _stored(self, name: str) -> str | None:
        if name in self.files:
            return name
        shorter = name.partition(".")[2]
        if shorter in self.files:
            return shorter
        longer = [stored for stored in self.files if stored.partition(".")[2] == name]
        return longer[0] if len(longer) == 1 else None
