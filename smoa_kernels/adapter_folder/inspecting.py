"""Reports an adapter folder's contents, and whether it fits a base model, without building a model."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import check_path, naming
from ..definition.ranks import trainable_parameters
from ..definition.sketch import TOLERANCE
from .base_model import BaseModel
from .format import PREFIX, StoredAdapter
from .quantized_formats import QuantizedBase
from .reading import read_adapter


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer."""

    name: str  # its path in the base model
    shape: tuple[int, ...]  # (N, C) of W0; (E, N, C) of a fused weight of experts
    ranks: tuple[int, ...]  # r_k of each block
    parameters: int  # `Σ r_k (N_k + C_k)`, of all experts together
    fingerprint: str  # first digits of W0's sketch (the first expert's), equal for one base in one precision
    # Estimate of the relative difference between the given base and the one that the adapter was trained on; None
    # without a base, infinity for a layer that the base lacks or has in another shape. Of experts, the largest.
    base_distance: float | None
    worst_expert: int | None = None  # whose distance that is; None for a single weight, and without a base

    @property
    def kind(self) -> str:
        """Its path with * for numbers: the same for the corresponding layer of every decoder layer."""
        return ".".join("*" if part.isdigit() else part for part in self.name.split("."))

    @property
    def num_blocks(self) -> int:
        """K."""
        return len(self.ranks)

    @property
    def fits(self) -> bool | None:
        """Whether the given base is the one that the adapter was trained on, in any precision."""
        return None if self.base_distance is None else self.base_distance <= TOLERANCE


@dataclass(frozen=True)
class AdapterReport:
    """An adapter folder."""

    config: dict[str, Any]  # as the file holds it
    layers: tuple[LayerReport, ...]  # sorted by name, with numbers by value
    file_size: int  # bytes of the file of weights
    other_tensors: tuple[str, ...]  # names of the others in it: biases, modules that are saved in full

    @property
    def parameters(self) -> int:
        """Trained parameters of all SMoA layers."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def fits(self) -> bool | None:
        """Whether every layer fits the given base; None without one."""
        verdicts = [layer.fits for layer in self.layers]
        return None if None in verdicts else all(verdicts)


def inspect_adapter(
    folder: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> AdapterReport:
    """Read an adapter folder, and compare it with a base model's.

    Args:
        folder: the adapter, as `save_pretrained` wrote it.
        base: folder of a base model in safetensors files, sharded or not.
        progress: called with the number of finished layers, and of all layers.
    """
    check_path("folder", folder)
    if base is not None:
        check_path("base", base)
    adapter = read_adapter(Path(folder))
    model = quantized = None
    if base is not None:
        model = BaseModel(Path(base))
        settings = model.config.get("quantization_config")
        quantized = None if settings is None else QuantizedBase(model, settings)
    layers = []
    for name, layer in adapter.layers.items():
        distances = None if model is None else _distances(name, layer, model, quantized)
        layers.append(_layer(name, layer, distances))
        progress(len(layers), len(adapter.layers))
    others = tuple(PREFIX + key for key in sorted(adapter.in_full))
    return AdapterReport(adapter.config, tuple(layers), adapter.path.stat().st_size, others)


def _layer(name: str, adapter: StoredAdapter, distances: list[float] | None) -> LayerReport:
    experts, worst = adapter.matrices(), None
    ranks = experts[0].ranks.tolist()
    if adapter.of_experts and distances is not None:
        worst = max(range(len(distances)), key=distances.__getitem__)
    return LayerReport(
        name=name,
        shape=adapter.shape,
        ranks=tuple(ranks),
        parameters=sum(trainable_parameters(own.partition, ranks, own.group_size) for own in experts),
        # Four digits for each of the first four numbers.
        fingerprint="".join(f"{round(float(x) * 4096) & 0xFFFF:04x}" for x in experts[0].sketch[:4]),
        base_distance=None if distances is None else max(distances),
        worst_expert=worst,
    )


def _distances(
    name: str, adapter: StoredAdapter, model: BaseModel, quantized: QuantizedBase | None
) -> list[float]:
    """The distance of each expert's W0, or of the layer's, from the base's."""
    if quantized is not None and (layer := quantized.layer(name)) is not None:
        with naming(name):
            return [adapter.orient(layer.read().dequantize())[1]]
    experts, fused = adapter.matrices(), adapter.of_experts
    stored = model.get(name if fused else model.weight_name(name))
    if stored is None or stored.ndim < 2 or (fused and (stored.ndim != 3 or len(stored) != len(experts))):
        return [float("inf")] * len(experts)
    weights = stored if fused else [stored]
    return [own.orient(weight)[1] for own, weight in zip(experts, weights, strict=True)]
