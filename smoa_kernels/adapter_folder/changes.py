"""`Merge`: which stored tensors of a base model an adapter changes, and their new values."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import eager
from ..checks import check_path, is_finite, naming
from ..definition.precision import DTYPES, dtype_names
from .base_model import BaseModel
from .format import HIRA, METHOD, StoredAdapter
from .quantized import Rescaled, Rescaling, check_distance
from .quantized_formats import QuantizedBase
from .reading import read_adapter

_INSTEAD = "merge with PEFT's merge_and_unload(), then save_pretrained()"


class Change(NamedTuple):
    """How an adapter changes a parameter of the model."""

    name: str
    # In which W0 may be stored; the adapter's own, (N, C) or (E, N, C), comes first.
    shapes: Sequence[tuple[int, ...]]
    # W_eff from W0, both as they are stored, which may be transposed; ValueError if it is not the W0 of the training.
    effective: Callable[[Tensor], Tensor]
    is_layer: bool = True  # else the tensor is saved in full

    def fitting(self, stored: Tensor) -> Tensor:
        """The base's tensor, if it has a shape of the adapter's."""
        shape = tuple(stored.shape)
        if self.is_layer and len(self.shapes[0]) == 2 and stored.ndim > 2:  # a convolution's
            shape = tuple(stored.flatten(1).shape)
        if shape not in self.shapes:
            raise ValueError(
                f"it has shape {tuple(stored.shape)} in the base, and {' or '.join(map(str, self.shapes))} in the "
                "adapter. If tokens were added, resize the base's embeddings as before training and save it first"
            )
        return stored


class Merge:
    """A merge, checked and ready: the base's files, and the change of each stored tensor that the adapter changes."""

    def __init__(
        self, base: str | os.PathLike[str], adapter: str | os.PathLike[str], dtype: torch.dtype | None
    ) -> None:
        check_path("base", base)
        check_path("adapter", adapter)
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {dtype_names(DTYPES)}, got {dtype}")
        self.base, self.adapter, self.dtype = Path(base), Path(adapter), dtype
        self.model = BaseModel(self.base)
        self.rescaled: list[Rescaled] = []  # of each quantised layer that `tensors` has made so far
        files = self.model.by_file()
        if not (self.base / "config.json").is_file():
            raise FileNotFoundError(f"there is no config.json in {self.base}")
        quantized = None
        if (settings := self.model.config.get("quantization_config")) is not None:
            check_keeps_dtype(dtype)
            quantized = QuantizedBase(self.model, settings)
        changes = [*_read_changes(self.adapter, self.model, dtype, quantized)]
        self._check_ties([change.name for change in changes])
        self.removed: set[str] = set()  # stored tensors that the merged model lacks
        self.changes = {stored: change for change in changes for stored in self._stored(change)}
        self.files = {path: [n for n in names if n not in self.removed] for path, names in files.items()}
        changed = {self.model.files[name] for name in {*self.changes, *self.removed}}
        self.touched = changed if dtype is None else {*self.files}  # files that differ from the base's
        self.keeps_sizes = dtype is None and not self.removed  # whether no tensor gets another size
        # Of the changed parameters that are made of several tensors, the new tensors that were not asked for yet.
        self._made: dict[str, Tensor] = {}

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Make these tensors of the merged model, in memory of their own."""
        for name in names:
            stored, change = self.model.read(name), self.changes.get(name)
            value = stored if change is None else self._changed(name, change, stored)
            dtype = self.dtype or stored.dtype if stored.dtype in DTYPES else stored.dtype
            if isinstance(change, Rescaling):  # scales that were quantised too become float32
                dtype = value.dtype
            tensor = value.to(dtype, copy=True, memory_format=torch.contiguous_format)
            if change is not None and not is_finite(tensor):
                raise ValueError(f"{name}: the merged tensor holds NaN or Inf in {dtype_names([dtype])}")
            yield name, tensor

    def _changed(self, name: str, change: Change | Rescaling, stored: Tensor) -> Tensor:
        if name not in self._made:
            with naming(change.name):
                if isinstance(change, Rescaling):
                    self._made |= self._rescaled(change)
                elif self.model.stored_name(change.name) == name:
                    return change.effective(stored)
                else:
                    architecture = self.model.architecture
                    W0 = change.fitting(architecture.assemble(change.name, self.model.read))
                    self._made |= architecture.take_apart(change.name, change.effective(W0))
                if name not in self._made:
                    raise ValueError(f"transformers cannot split it into the stored tensors: {_INSTEAD}")
        return self._made.pop(name)

    def _rescaled(self, change: Rescaling) -> dict[str, Tensor]:
        weight = change.read()
        new = change.new_scales(weight)
        self.rescaled.append(new)
        stored = change.stored(weight, new.scales)
        return {name: tensor for name, tensor in stored.items() if tensor is not None}

    def _stored(self, change: Change | Rescaling) -> list[str]:
        """The stored tensors that hold a parameter: one, or those that it is made of."""
        if isinstance(change, Rescaling):
            weight = change.read()
            new = change.stored(weight, weight.scales)
            self.removed |= {name for name, tensor in new.items() if tensor is None}
            return [*new.keys() - self.removed]
        if (stored := self.model.stored_name(change.name)) is not None:
            with naming(change.name):
                change.fitting(self.model.read(stored))
            return [stored]
        if parts := self.model.architecture.parts.get(change.name):
            return parts
        raise ValueError(
            f"{self.base} stores no {change.name}, which the adapter changes. A new head: save the base with it "
            f"first. A parameter that is a part of another: {_INSTEAD}"
        )

    def _check_ties(self, changed: Sequence[str]) -> None:
        """Raise if the adapter changes a parameter that the base ties to another."""
        if all(any(part.isdigit() for part in name.split(".")) for name in changed):
            return  # to those of numbered layers nothing is tied; importing transformers takes seconds
        stored = {self.model.stored_name(name) or name for name in changed}
        for pair in self.model.architecture.tied.items():
            if stored & {self.model.stored_name(name) or name for name in pair}:
                raise ValueError(
                    f"the adapter changes {' or '.join(pair)}, which {self.base} ties to each other: {_INSTEAD}"
                )


def check_keeps_dtype(dtype: torch.dtype | None) -> None:
    """Refuse a dtype for the merged model, whose base is quantised."""
    if dtype is not None:
        raise ValueError(f"dtype must be None for a quantised base, whose tensors keep theirs, got {dtype}")


def _read_changes(
    folder: Path, base: BaseModel, dtype: torch.dtype | None, quantized: QuantizedBase | None
) -> Iterator[Change | Rescaling]:
    """Read how an SMoA or HiRA adapter changes parameters, by the base model's names."""
    adapter = read_adapter(folder, (METHOD, HIRA))
    # PEFT saves the W0 of an embedding that it adapts, whose last rows may be new.
    own = {name: adapter.tensors.get(f"{name}.base_layer.weight") for name in adapter.layers}
    for key, tensor in adapter.in_full.items():
        name = key.replace(".base_layer.", ".")
        if not any(tensor is W0 for W0 in own.values()):
            yield Change(name, [tuple(tensor.shape)], partial(lambda own, _: own, tensor), False)
    for name, stored in adapter.layers.items():
        # For experts the file names the parameter itself.
        parameter, shape = name if stored.of_experts else base.weight_name(name), stored.shape
        if quantized is not None and (layer := quantized.layer(name)) is not None:
            yield Rescaling(parameter, layer, stored)
            continue
        # HiRA has no sketch. fan_in_fan_out is not used: PEFT corrects it for each layer by the layer's class.
        swapped = base.stores_swapped(name, shape) if adapter.is_hira else None
        effective = partial(_effective, stored, dtype, swapped, own[name])
        yield Change(parameter, [shape, (*shape[:-2], shape[-1], shape[-2])], effective)


def _effective(
    adapter: StoredAdapter,
    dtype: torch.dtype | None,
    swapped: bool | None,
    own: Tensor | None,
    stored: Tensor,
) -> Tensor:
    """W_eff of a matrix or of a stack of them, in its stored orientation; `swapped` is None if the sketch shows it.

    Where the adapter has a W0 of its `own`, that replaces the base's.
    """
    stored = stored if own is None else own.to(stored.dtype)
    if stored.dtype not in DTYPES:
        raise ValueError(f"W0 must be {dtype_names(DTYPES)} to be merged, got {stored.dtype}")
    if adapter.of_experts:
        experts = zip(adapter.matrices(), stored, strict=True)
        return torch.stack([_effective(part, dtype, None, None, weight) for part, weight in experts])
    if stored.ndim > 2:
        return _effective(adapter, dtype, swapped, None, stored.flatten(1)).view_as(stored)
    if swapped is None:
        weight, distance = adapter.orient(stored)
        check_distance(distance)
    else:
        weight = stored.T if swapped else stored
    W_eff = eager.modulated_weight(adapter.packed(weight.to(dtype or weight.dtype)))
    return W_eff if weight is stored else W_eff.T
