"""Measures every adapted layer of a model: W0, its update by SMoA, and another update to compare it with."""

from __future__ import annotations

import functools
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ..checks import check_weight
from ..definition.ranks import resolve_ranks
from ..definition.sketch import TOLERANCE, sketch_distance, sketch_weight
from ..definition.spectral_order import one_thread
from ..peft.file_format import LayerBlocks
from ..peft.folders import ModelFolder
from ..peft.stored_names import StoredNames
from .layer import LayerSpectrum, layer_spectrum
from .updates import (
    AdapterUpdates,
    LayerUpdate,
    random_lora,
    random_smoa,
    read_updates,
)

__all__ = ["ModelSpectrum", "Source", "layer_kind", "model_spectrum"]


@dataclass(frozen=True)
class Source:
    """The adapter, saved or random, that one of the compared updates comes from.

    Attributes:
        method: SMoA, LoRA or HiRA.
        ranks: the layers' different rank budgets, ascending.
        num_blocks: the layers' different numbers of blocks, ascending; 1 for methods without blocks.
        parameters: trainable parameters of all layers.
        folder: folder of the saved adapter; None where the factors are random.
    """

    method: str
    ranks: tuple[int, ...]
    num_blocks: tuple[int, ...]
    parameters: int
    folder: Path | None

    @classmethod
    def of(cls, updates: Sequence[LayerUpdate], folder: str | os.PathLike[str] | None) -> Source:
        """Summarise the updates of all layers."""
        return cls(
            method=updates[0].method,
            ranks=tuple(sorted({sum(update.ranks) for update in updates})),
            num_blocks=tuple(sorted({len(update.ranks) for update in updates})),
            parameters=sum(update.parameters for update in updates),
            folder=None if folder is None else Path(folder),
        )

    @property
    def random(self) -> bool:
        """Whether the factors are random rather than trained."""
        return self.folder is None

    @property
    def label(self) -> str:
        """Method, rank and blocks, as text."""
        blocks = f", K={_span(self.num_blocks)}" if self.method == "SMoA" else ""
        return f"{self.method} r={_span(self.ranks)}{blocks}{', random' if self.random else ''}"


@dataclass(frozen=True)
class ModelSpectrum:
    """The measures of a model's layers.

    Attributes:
        model: name of its folder.
        sources: where the updates in `layers` come from: "ours" is SMoA, "theirs" what it is compared with.
        layers: measures by layer name, in the model's order.
        left_out: how many layers were left out because only one of the two adapters adapts them.
    """

    model: str
    sources: Mapping[str, Source]
    layers: Mapping[str, LayerSpectrum]
    left_out: int


def layer_kind(name: str) -> str:
    """The part of a layer's name that is the same in every decoder block.

    Example:
        >>> layer_kind("model.layers.11.self_attn.q_proj")
        'self_attn.q_proj'
    """
    return re.split(r"(?:^|\.)\d+\.", name)[-1]


def model_spectrum(
    model: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    compare: str | os.PathLike[str] | None = None,
    *,
    rank: int = 8,
    num_blocks: int = 2,
    targets: Sequence[str] = (),
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ModelSpectrum:
    """Measure every adapted layer of a model.

    Args:
        model: folder of a base model in safetensors files.
        adapter: folder of an SMoA adapter; random factors where None.
        compare: folder of a LoRA, HiRA or other SMoA adapter. Where None, a LoRA with random factors; in each layer it
            has the rank whose number of parameters comes closest to SMoA's.
        rank: r of the random SMoA adapter.
        num_blocks: K of the random SMoA adapter.
        targets: last parts of the names of the layers to measure. Where empty, all layers that the adapters adapt, or
            without adapters all linear layers but the head.
        seed: seed of the random factors. A layer's factors do not depend on which other layers are measured.
        progress: called with the number of finished layers, and of all layers.

    Raises:
        ValueError, OSError: a file cannot be read, or an adapter does not fit the model or was trained over another
            base weight. The message names the folder or the layer.
    """
    ranks = resolve_ranks(rank, num_blocks)
    folder = ModelFolder(Path(model))
    ours = None if adapter is None else read_updates(Path(adapter), ("SMOA",))
    theirs = None if compare is None else read_updates(Path(compare))
    given = [each for each in (ours, theirs) if each is not None]
    stored, left_out = _layers(folder, given)
    chosen = {name: swapped for name, swapped in stored.items() if _is_target(name, targets)}
    if not chosen:
        kinds = ", ".join(sorted({layer_kind(name) for name in stored}))
        raise ValueError(f"no layer's name ends with {' or '.join(targets)}; the layers are {kinds}")
    layers: dict[str, LayerSpectrum] = {}
    used: dict[str, list[LayerUpdate]] = {"ours": [], "theirs": []}
    # The last one is kept: a weight's experts follow one another, and to put it together takes a second.
    read = functools.lru_cache(maxsize=1)(StoredNames(folder).get)
    for name, swapped in chosen.items():
        progress(len(layers), len(chosen))
        weight = _weight(read, name, swapped, [each.layers[name].blocks for each in given])
        if weight is None:
            raise ValueError(f"{folder.folder} has no layer {name}, which the adapter adapts")
        generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
        with _named(name):
            smoa = random_smoa(weight, ranks, generator) if ours is None else ours.layers[name]
            other = (
                random_lora(weight.shape, smoa.parameters, generator)
                if theirs is None
                else theirs.layers[name]
            )
            deltas = {key: _delta(update, weight) for key, update in (("ours", smoa), ("theirs", other))}
            # A second thread speeds LAPACK's SVD up little, and halves its speed where that core is busy.
            with one_thread():
                layers[name] = layer_spectrum(weight, cast(LayerBlocks, smoa.blocks).partition, deltas)
        used["ours"].append(smoa)
        used["theirs"].append(other)
    progress(len(layers), len(chosen))
    folders = {"ours": adapter, "theirs": compare}
    sources = {key: Source.of(updates, folders[key]) for key, updates in used.items()}
    return ModelSpectrum(Path(model).resolve().name, sources, layers, left_out)


def _layers(folder: ModelFolder, adapters: Sequence[AdapterUpdates]) -> tuple[dict[str, bool], int]:
    """The layers that every adapter adapts, and whether each is stored (C, N); the number that only one adapts."""
    if not adapters:
        return folder.linear_layers(), 0
    common = [name for name in adapters[0].layers if all(name in a.layers for a in adapters)]
    if not common:
        raise ValueError("the two adapters have no layer in common")
    every = {name for a in adapters for name in a.layers}
    return dict.fromkeys(common, adapters[0].fan_in_fan_out), len(every) - len(common)


def _is_target(name: str, targets: Sequence[str]) -> bool:
    return not targets or any(f".{name}".endswith(f".{target}") for target in targets)


def _weight(
    read: Callable[[str], Tensor | None], name: str, swapped: bool, blocks: Sequence[LayerBlocks | None]
) -> Tensor | None:
    """W0 (N, C) of a layer, or of one expert of a fused weight; None where the model lacks it.

    Args:
        read: reads a parameter.
        name: of the layer.
        swapped: whether a layer is stored (C, N); of an expert, its adapter's blocks tell.
        blocks: of the layer in each adapter, None where it is no SMoA adapter.
    """
    fused, bracket, number = name.partition("[")
    weight = read(fused if bracket else f"{name}.weight")
    if weight is not None and bracket:
        expert = int(number.removesuffix("]"))
        weight = weight[expert] if weight.ndim == 3 and expert < len(weight) else None
    if weight is None:
        return None
    with _named(name):
        check_weight(weight)
    if bracket:
        return next(each for each in blocks if each is not None).facing(weight)[0]
    return weight.T if swapped else weight


@contextmanager
def _named(layer: str) -> Iterator[None]:
    """Put the layer's name before the message of an error."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{layer}: {error}") from error


def _delta(update: LayerUpdate, weight: Tensor) -> Tensor:
    if update.shape != tuple(weight.shape):
        raise ValueError(
            f"the {update.method} adapter is for {update.shape}, the model has {tuple(weight.shape)}"
        )
    if update.blocks is not None:
        distance = sketch_distance(update.blocks.sketch, sketch_weight(weight))
        if not distance <= TOLERANCE:
            raise ValueError(
                f"the adapter was trained over another base weight, which differs by about {distance:.0%}"
            )
    delta = update.delta(weight)
    check_weight(delta, f"the {update.method} adapter's update")
    return delta


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]}…{values[-1]}"
