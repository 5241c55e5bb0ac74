"""What lies in the folders of adapters and base models, read without building either."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

__all__ = ["PREFIX", "ModelFolder", "by_number", "read_config", "read_state"]

# Of every key in an adapter's file.
PREFIX = "base_model.model."


def read_config(folder: Path, methods: Sequence[str]) -> PeftConfig:
    """The configuration of an adapter of one of `methods`, as PEFT names them.

    Raises:
        ValueError, FileNotFoundError: naming the folder; there is none, it is another method's, or it is wrong.
    """
    if not (folder / CONFIG_NAME).is_file():  # PEFT would look for it on a hub
        raise FileNotFoundError(f"there is no {CONFIG_NAME} in {folder}")
    try:
        data = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"{CONFIG_NAME} must hold a JSON object, got {type(data).__name__}")
        method = data.get("peft_type")
        if method not in methods:
            allowed = " or ".join(str(getattr(name, "value", name)) for name in methods)
            raise ValueError(f"it is an adapter of the method {method}, not {allowed}")
        return PEFT_TYPE_TO_CONFIG_MAPPING[method].from_pretrained(os.fspath(folder))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder}: {error}") from error


def read_state(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file of an adapter's weights, and all tensors in it.

    Raises:
        ValueError, FileNotFoundError: there is none, or it is no safetensors file.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"there is no {SAFETENSORS_WEIGHTS_NAME} in {folder}")
    with _opened(path) as file:
        return path, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping


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
            try:
                files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                yield from ((name, folder / file) for name, file in files.items())
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{index} is not an index of safetensors files: {error!r}") from error
            return
        for path in sorted(folder.glob("*.safetensors")):
            with _opened(path) as file:
                yield from ((name, path) for name in file.keys())  # noqa: SIM118  # it is no mapping

    def get(self, name: str) -> Tensor | None:
        """The tensor `name`. A model without its head was saved without, or with, the first part of each name."""
        stored = self._stored(name)
        if stored is None:
            return None
        with _opened(self.files[stored]) as file:
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


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
