"""What an adapter folder holds, and whether it fits a base model, without building either."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..packed import trainable_parameters
from ..sketch import TOLERANCE, sketch_distance, sketch_weight
from .config import SMoAConfig
from .layout import STATE_KEYS
from .loading import read_blocks
from .model import layer_settings
from .registry import PEFT_TYPE

__all__ = ["AdapterReport", "LayerReport", "inspect_adapter"]

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer.

    Attributes:
        name: its path in the base model.
        shape: (N, C) of W0.
        ranks: r_k of each block.
        parameters: `Σ r_k (N_k + C_k)`.
        fingerprint: first digits of the sketch of W0, the same for the same base in the same precision.
        base_distance: about the relative difference between the base that was given and the one that the adapter was
            trained over; None without a base, infinity for a layer that it lacks or has in another shape.

    Example:
        >>> LayerReport("q_proj", (6, 8), ranks=(2, 2), parameters=28, fingerprint="0123", base_distance=0.002).fits
        True
    """

    name: str
    shape: tuple[int, int]
    ranks: tuple[int, ...]
    parameters: int
    fingerprint: str
    base_distance: float | None

    @property
    def num_blocks(self) -> int:
        """K."""
        return len(self.ranks)

    @property
    def fits(self) -> bool | None:
        """Whether the base that was given is the one that the adapter was trained over, in whatever precision."""
        return None if self.base_distance is None else self.base_distance <= TOLERANCE


@dataclass(frozen=True)
class AdapterReport:
    """An adapter folder.

    Attributes:
        config: its configuration.
        layers: in the order of their names, numbers by their values.
        file_size: bytes of the weights' file.
        other_tensors: what else is trained and saved in it (biases, further modules).

    Example:
        >>> AdapterReport(SMoAConfig(), layers=(), file_size=0, other_tensors=()).parameters
        0
    """

    config: SMoAConfig
    layers: tuple[LayerReport, ...]
    file_size: int
    other_tensors: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Of all SMoA layers."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def fits(self) -> bool | None:
        """Whether every layer fits the base that was given."""
        verdicts = [layer.fits for layer in self.layers]
        return None if None in verdicts else all(verdicts)


def inspect_adapter(
    folder: str | os.PathLike[str], base: str | os.PathLike[str] | None = None
) -> AdapterReport:
    """Read an adapter folder, and compare it with a base model's.

    Args:
        folder: as `save_pretrained` left it.
        base: folder of a base model in safetensors files, sharded or not.

    Raises:
        ValueError, FileNotFoundError: no configuration or weights, another method's, what `SMoAConfig.from_pretrained`
            finds wrong, labels or ranks out of range or missing, no readable safetensors in `base`.

    Example:
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), SMoAConfig(r=4, target_modules=["0"]))
        >>> model.save_pretrained("adapter")
        >>> report = inspect_adapter("adapter")
        >>> report.parameters, report.layers[0].ranks, report.fits
        (28, (2, 2), None)
    """
    config = _config(Path(folder))
    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"there is no {SAFETENSORS_WEIGHTS_NAME} in {folder}")
    with _opened(path) as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping
    bases = None if base is None else _Weights(Path(base))
    stems = sorted({f"{key.rpartition('.')[0]}." for key in state if ".smoa_" in key}, key=_by_number)
    if not stems:
        raise ValueError(f"{path} holds no layer of an SMoA adapter")
    layers = tuple(_layer(stem, state, bases, config) for stem in stems)
    others = tuple(sorted(key for key in state if ".smoa_" not in key))
    return AdapterReport(config, layers, path.stat().st_size, others)


def _config(folder: Path) -> SMoAConfig:
    if not (folder / CONFIG_NAME).is_file():  # PEFT would look for it on a hub
        raise FileNotFoundError(f"there is no {CONFIG_NAME} in {folder}")
    try:
        data = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"{CONFIG_NAME} must hold a JSON object, got {type(data).__name__}")
        method = data.get("peft_type")
        if method != PEFT_TYPE:
            raise ValueError(f"it is an adapter of the method {method}, not {PEFT_TYPE.value}")
        return SMoAConfig.from_pretrained(os.fspath(folder))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder}: {error}") from error


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def _layer(stem: str, state: Mapping[str, Tensor], bases: _Weights | None, config: SMoAConfig) -> LayerReport:
    name = stem.removesuffix(".").removeprefix(_PREFIX)
    missing = [key for key in STATE_KEYS if stem + key not in state]
    if missing:
        raise ValueError(f"{name}: the adapter lacks {', '.join(missing)}")
    given = {key: state[stem + key] for key in STATE_KEYS}
    partition, ranks, sketch = read_blocks(name, given, layer_settings(config, name).r)
    distance = None
    if bases is not None:
        weight = bases.get(f"{name}.weight")
        weight = weight.T if weight is not None and config.fan_in_fan_out else weight
        same_shape = weight is not None and tuple(weight.shape) == partition.shape
        distance = (
            sketch_distance(sketch, sketch_weight(weight))
            if weight is not None and same_shape
            else float("inf")
        )
    return LayerReport(
        name=name,
        shape=partition.shape,
        ranks=tuple(ranks.tolist()),
        parameters=trainable_parameters(partition, ranks.tolist()),
        fingerprint=_digits(sketch),
        base_distance=distance,
    )


def _digits(sketch: Tensor) -> str:
    """Sixteen hexadecimal digits, four for each of the first projections."""
    return "".join(f"{round(float(value) * 4096) & 0xFFFF:04x}" for value in sketch[:4])


class _Weights:
    """Tensors of a model folder by name, read one at a time."""

    def __init__(self, folder: Path) -> None:
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
        stored = name if name in self.files else self._otherwise_prefixed(name)
        if stored is None:
            return None
        with _opened(self.files[stored]) as file:
            tensor: Tensor = file.get_tensor(stored)
        return tensor

    def _otherwise_prefixed(self, name: str) -> str | None:
        shorter = name.partition(".")[2]
        if shorter in self.files:
            return shorter
        longer = [stored for stored in self.files if stored.partition(".")[2] == name]
        return longer[0] if len(longer) == 1 else None
