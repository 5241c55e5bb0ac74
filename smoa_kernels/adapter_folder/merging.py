"""Merges an adapter's folder into a base model's, tensor by tensor: no model is built, and one layer is in memory.

To support another kind of adapted tensor, yield a `Change` of it in `_read_changes`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends import eager
from ..checks import check_path, naming
from ..definition.packed import PackedAdapter, scaling_tensor
from ..definition.precision import DTYPES, dtype_names
from ..definition.sketch import TOLERANCE
from .base_model import BaseModel
from .format import HIRA, METHOD, LayerBlocks
from .reading import read_adapter, read_json


def merged_weights(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Give every tensor of a base model with an adapter merged into it, under its stored name, one after another.

    One layer is in memory at a time. The tensors of an SMoA adapter are bit for bit those of
    `PeftModel.from_pretrained(...).merge_and_unload()` over the base in `dtype`. Into bfloat16 and float16 W_eff is
    rounded by thresholds, as a layer's forward does, so that small updates survive (docs/numerics.md).

    Args:
        base: folder of a base model in safetensors files, not quantised.
        adapter: folder of an SMoA adapter, or of a HiRA adapter of PEFT.
        dtype: of all floating-point tensors; each keeps its own where None. W0 is converted to it first.

    Raises:
        TypeError: a folder is not a path.
        ValueError, FileNotFoundError: a file is missing or cannot be read, an argument is not allowed, the base is
            quantised or lacks a tensor that the adapter changes. Later, at a tensor: the adapter was trained over
            another one, or the result is not finite. The message names the tensor.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from smoa_kernels.peft import SMoAConfig
        >>> sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 8}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1))
        >>> model.save_pretrained("base")
        >>> get_peft_model(model, SMoAConfig(target_modules=["q_proj"])).save_pretrained("adapter")
        >>> weights = dict(merged_weights("base", "adapter", dtype=torch.bfloat16))
        >>> weights["model.layers.0.self_attn.q_proj.weight"].dtype
        torch.bfloat16
    """
    return iter(FolderMerge(base, adapter, dtype=dtype))


@dataclass(frozen=True)
class Change:
    """How an adapter changes a parameter.

    Attributes:
        name: the parameter's name in the model.
        shapes: those in which W0 may be stored; the adapter's own, (N, C) or (E, N, C), comes first.
        effective: makes W_eff from W0, both as they are stored, which may be transposed, in the result's dtype. Raises
            ValueError if the adapter was trained on another weight.
        is_whole: whether the adapter holds the parameter itself; W0 is then not read.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    effective: Callable[[Tensor], Tensor]
    is_whole: bool = False


@dataclass
class _Planned:
    """Sources of a tensor of the merged model: the base's tensor `stored`, and the change of the parameter it is."""

    stored: str
    shape: torch.Size
    dtype: torch.dtype  # of the result
    change: Change | None = None
    parts: Sequence[str] = ()  # if the parameter is made from several stored tensors: all of them


class FolderMerge:
    """A merge of an adapter's folder into a base model's, checked and ready; see :func:`merged_weights`.

    Attributes:
        base, adapter: the folders.
        config: the base's configuration.
        plan: the sources of each tensor, in the order of the base's files.
        untied: names of tensors that the base ties to another one, and that now are stored themselves.
    """

    def __init__(
        self,
        base: str | os.PathLike[str],
        adapter: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None,
    ) -> None:
        check_path("base", base)
        check_path("adapter", adapter)
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {dtype_names(DTYPES)}, got {dtype}")
        self.base, self.adapter = Path(base), Path(adapter)
        self.dtype = dtype
        self._model = BaseModel(self.base)
        self.config = _read_plain_config(self.base)
        self.plan = {
            name: _Planned(
                name, tensor.shape, tensor.dtype if tensor.dtype not in DTYPES else dtype or tensor.dtype
            )
            for name, tensor in self._model.tensors()
        }
        self.untied: list[str] = []
        changes = [*_read_changes(self.adapter, self._model, dtype)]
        # Of the last changed parameter that is made from several tensors, the new parts that were not asked for yet.
        self._parts: dict[str, Tensor] = {}
        if any(_stands_alone(change.name) for change in changes):
            self._untie({self._stored(change.name) or change.name for change in changes})
        for change in changes:
            self._place(change)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.plan:
            yield name, self.tensor(name)

    def tensor(self, name: str) -> Tensor:
        """Make one tensor of the merged model, in memory of its own."""
        planned = self.plan[name]
        change = planned.change
        value = self._model.read(planned.stored) if change is None else self._changed(planned, change)
        rounded = value.to(planned.dtype, copy=True, memory_format=torch.contiguous_format)
        if change is not None and not _is_finite(rounded):
            raise ValueError(f"{name}: the merged tensor holds NaN or Inf in {dtype_names([planned.dtype])}")
        return rounded

    def _changed(self, planned: _Planned, change: Change) -> Tensor:
        """A changed parameter, or its stored part; the other parts are kept for their turn."""
        with naming(change.name):
            if not planned.parts:
                return change.effective(self._model.read(planned.stored))
            if planned.stored not in self._parts:
                architecture = self._model.architecture
                whole = architecture.assemble(change.name, self._model.read)
                _check_shape(whole.shape, change)
                self._parts = architecture.take_apart(change.name, change.effective(whole))
                if self._parts.keys() != set(planned.parts):
                    raise ValueError(
                        "transformers cannot split it into the stored tensors: merge with merge_and_unload()"
                    )
        return self._parts.pop(planned.stored)

    def _untie(self, changed: set[str]) -> None:
        """Plan tied parameters as tensors of their own if the adapter changes one of them."""
        tied = self._model.architecture.tied
        for name, source in tied.items():
            places = [self._stored(each) or each for each in (name, source)]
            if not changed & set(places):
                continue
            if self._stored(name) is None and places[1] in self.plan:
                if len(tied) > 1:
                    raise ValueError(
                        f"the adapter changes {name} or {source}, which are tied, and {self.base} ties other "
                        "parameters too: they cannot be stored apart"
                    )
                self.plan[name] = replace(self.plan[places[1]])
            self.untied.append(name)

    def _place(self, change: Change) -> None:
        """Plan the change of a parameter, which is a stored tensor or made of several."""
        name, stored = change.name, self._stored(change.name)
        if stored is not None:
            planned = self.plan[stored]
            planned.change = change
            with naming(name):
                _check_shape(planned.shape, change)
            if not change.is_whole and planned.dtype not in DTYPES:
                raise ValueError(f"{name} must be {dtype_names(DTYPES)} to be merged, got {planned.dtype}")
            return
        parts = [] if change.is_whole else self._model.architecture.parts.get(name, [])
        if not parts:
            raise ValueError(
                f"{self.base} stores no {name}, which the adapter changes. A new head: save the base with it first. A "
                "parameter that transformers makes of others as it loads the base: merge with merge_and_unload()"
            )
        for part in parts:  # made one after another
            self.plan[part] = replace(self.plan.pop(part), change=change, parts=parts)

    def _stored(self, name: str) -> str | None:
        """The planned tensor of a parameter; None if it is not a single one."""
        return name if name in self.plan else self._model.stored_name(name)


def _read_plain_config(base: Path) -> dict[str, Any]:
    path = base / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"there is no config.json in {base}")
    config = read_json(path)
    quantised = config.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ValueError(
            f"{base} is quantised ({method}): merge into the model that it was quantised from, or save "
            "the result of model.dequantize() and merge into that"
        )
    return config


def _read_changes(folder: Path, base: BaseModel, dtype: torch.dtype | None) -> Iterator[Change]:
    """Read how an SMoA or HiRA adapter changes parameters, by the base model's names."""
    adapter = read_adapter(folder, (METHOD, HIRA))
    for key, tensor in adapter.whole.items():
        name = key.replace(".base_layer.", ".")
        yield Change(name, (tuple(tensor.shape),), partial(_as_saved, tensor), is_whole=True)
    for name, blocks in adapter.layers.items():
        # For experts the file names the parameter itself.
        parameter = name if blocks.of_experts else f"{name}.weight"
        A, B = (adapter.tensors[f"{name}.{key}"] for key in ("smoa_A", "smoa_B"))
        shape = (*B.shape[:-1], A.shape[-1])
        if adapter.is_hira:
            # fan_in_fan_out is not used: PEFT corrects it for each layer by the layer's class.
            swapped = base.stores_swapped(name, blocks.partition.shape)
            effective = partial(_hira_weight, blocks, A, B, swapped, dtype)
        else:
            effective = partial(_smoa_weight, blocks, A, B, adapter.settings.for_layer(name).scaling, dtype)
        yield Change(parameter, (shape, (*shape[:-2], shape[-1], shape[-2])), effective)


def _as_saved(tensor: Tensor, stored: Tensor) -> Tensor:
    return tensor


def _smoa_weight(
    blocks: LayerBlocks, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype | None, stored: Tensor
) -> Tensor:
    """W_eff of a matrix or of a stack of them, in its stored orientation."""
    if blocks.of_experts:
        matrices = zip(blocks.matrices(), A, B, stored, strict=True)
        return torch.stack(
            [_smoa_weight(one, a, b, scaling, dtype, weight) for one, a, b, weight in matrices]
        )
    weight, distance = blocks.orient(stored)
    if not distance <= TOLERANCE:
        raise ValueError(
            f"the adapter was trained over another base weight (it differs by about {distance:.0%}, the same base "
            f"in another precision by at most {TOLERANCE:.0%})"
        )
    W_eff = _effective(blocks, A, B, scaling, weight.to(dtype or weight.dtype))
    return W_eff if weight is stored else W_eff.T


def _hira_weight(
    blocks: LayerBlocks, A: Tensor, B: Tensor, swapped: bool, dtype: torch.dtype | None, stored: Tensor
) -> Tensor:
    weight = stored.to(dtype or stored.dtype)
    return _effective(blocks, A, B, 1.0, weight.T).T if swapped else _effective(blocks, A, B, 1.0, weight)


def _effective(blocks: LayerBlocks, A: Tensor, B: Tensor, scaling: float, weight: Tensor) -> Tensor:
    ranks, s = blocks.ranks, scaling_tensor(scaling, weight.device)
    return eager.modulated_weight(PackedAdapter(weight, A, B, blocks.partition, ranks, s, ranks.tolist()))


def _check_shape(shape: torch.Size, change: Change) -> None:
    if tuple(shape) not in change.shapes:
        raise ValueError(
            f"it has shape {tuple(shape)} in the base, and {' or '.join(map(str, change.shapes))} in the adapter. If "
            "tokens were added, resize the base's embeddings as before training and save it first"
        )


def _is_finite(tensor: Tensor) -> bool:
    # A NaN is among the extremes; `isfinite` of the whole tensor would take a copy's memory.
    return not tensor.numel() or all(math.isfinite(value) for value in tensor.aminmax())


def _stands_alone(name: str) -> bool:
    """Whether a parameter belongs to no numbered layer, so that another may be tied to it."""
    return not any(part.isdigit() for part in name.split("."))
