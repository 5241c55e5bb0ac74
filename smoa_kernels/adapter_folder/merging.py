"""Merges an adapter's folder into a base model's, tensor by tensor: no model is built, and one layer is in memory.

To support another kind of adapted tensor, add a function that returns a `Change`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends import eager
from ..checks import check_choice, check_path, naming
from ..definition.packed import PackedAdapter, scaling_tensor
from ..definition.precision import DTYPES, dtype_names
from ..definition.sketch import TOLERANCE
from .base_model import BaseModel
from .format import HIRA, METHOD, LayerBlocks
from .reading import read_adapter, read_config, read_hira, read_json
from .rounding import round_stochastically

ROUNDINGS = ("nearest", "stochastic")

# Dtypes that are rounded stochastically; wider ones keep small updates anyway.
_HALF = (torch.bfloat16, torch.float16)


def merged_weights(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    rounding: str = "nearest",
    seed: int = 0,
) -> Iterator[tuple[str, Tensor]]:
    """Give every tensor of a base model with an adapter merged into it, under its stored name, one after another.

    One layer is in memory at a time. In the base's dtype and rounded to nearest, the tensors are bit for bit those of
    `PeftModel.from_pretrained(...).merge_and_unload()`.

    Args:
        base: folder of a base model in safetensors files, not quantised.
        adapter: folder of an SMoA adapter, or of a HiRA adapter of PEFT.
        dtype: of all floating-point tensors; each keeps its own where None. W_eff is computed from W0 as it is stored,
            at least in float32, and rounded once.
        rounding: "nearest", or "stochastic" for the tensors that the adapter changes, in bfloat16 and float16: up or
            down by chance, so that updates below half a last bit of W0 are kept on average (docs/numerics.md).
        seed: of the stochastic rounding; a tensor's bits depend on it and on the tensor's name alone.

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
    return iter(FolderMerge(base, adapter, dtype=dtype, rounding=rounding, seed=seed))


@dataclass(frozen=True)
class Change:
    """How an adapter changes a parameter.

    Attributes:
        shapes: those in which W0 may be stored; the adapter's own, (N, C) or (E, N, C), comes first.
        effective: makes W_eff from W0, both as they are stored, which may be transposed. W_eff is at least float32, or
            W0's dtype if the result must equal PEFT's. Raises ValueError if the adapter was trained over another
            weight.
        is_whole: whether the adapter holds the parameter itself; W0 is then not read.
    """

    shapes: tuple[tuple[int, ...], ...]
    effective: Callable[[Tensor], Tensor]
    is_whole: bool = False


@dataclass
class _Planned:
    """Sources of a tensor of the merged model: the base's tensor `stored`, and the changed parameter it is part of."""

    stored: str
    shape: torch.Size
    dtype: torch.dtype  # of the result
    parameter: str | None = None

    @property
    def changed(self) -> bool:
        """Whether the adapter changes it."""
        return self.parameter is not None


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
        rounding: str,
        seed: int,
    ) -> None:
        check_path("base", base)
        check_path("adapter", adapter)
        check_choice("rounding", rounding, ROUNDINGS)
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {dtype_names(DTYPES)}, got {dtype}")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed must be an int of at least 0, got {seed!r}")
        self.base, self.adapter = Path(base), Path(adapter)
        self.dtype, self.rounding, self.seed = dtype, rounding, seed
        self._model = BaseModel(self.base)
        self.config = _read_plain_config(self.base)
        self.plan = {
            name: _Planned(
                name, tensor.shape, tensor.dtype if tensor.dtype not in DTYPES else dtype or tensor.dtype
            )
            for name, tensor in self._model.tensors()
        }
        self.untied: list[str] = []
        self._changes = _read_changes(self.adapter, self._model, dtype, rounding)
        # For changed parameters that are made from several stored tensors: the names of these; and for the last such
        # parameter the new parts that were not asked for yet.
        self._made_of: dict[str, list[str]] = {}
        self._parts: dict[str, Tensor] = {}
        if any(_stands_alone(name) for name in self._changes):
            self._untie()
        for name, change in self._changes.items():
            self._place(name, change)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.plan:
            yield name, self.tensor(name)

    def tensor(self, name: str) -> Tensor:
        """Make one tensor of the merged model, in memory of its own."""
        planned = self.plan[name]
        if planned.parameter is None:
            value = self._model.read(planned.stored)
        else:
            value = self._changed(planned.stored, planned.parameter)
        narrowed = planned.dtype in _HALF and value.dtype not in _HALF
        if planned.changed and narrowed and self.rounding == "stochastic":
            rounded = round_stochastically(value, planned.dtype, seed=self.seed, name=name)
        else:
            rounded = value.to(planned.dtype, copy=True, memory_format=torch.contiguous_format)
        if planned.changed and not _is_finite(rounded):
            raise ValueError(f"{name}: the merged tensor holds NaN or Inf in {dtype_names([planned.dtype])}")
        return rounded

    def _changed(self, stored: str, name: str) -> Tensor:
        """A changed parameter, or its part `stored`; the other parts are kept for their turn."""
        change = self._changes[name]
        with naming(name):
            if name not in self._made_of:
                return change.effective(self._model.read(stored))
            if stored not in self._parts:
                architecture = self._model.architecture
                whole = architecture.assemble(name, self._model.read)
                _check_shape(whole.shape, change)
                self._parts = architecture.take_apart(name, change.effective(whole))
                if self._parts.keys() != set(self._made_of[name]):
                    raise ValueError(
                        "transformers cannot split it into the stored tensors: merge with merge_and_unload()"
                    )
        return self._parts.pop(stored)

    def _untie(self) -> None:
        """Plan tied parameters as tensors of their own if the adapter changes one of them."""
        tied = self._model.architecture.tied
        changed = {self._stored(name) or name for name in self._changes}
        for name, source in tied.items():
            places = [self._stored(each) or each for each in (name, source)]
            if not changed & set(places):
                continue
            if self._stored(name) is None and places[1] in self.plan:
                if len(tied) > 1:
                    raise ValueError(
                        f"the adapter changes {name} or {source}, which are tied, and {self.base} ties more "
                        f"parameters to {source}: they cannot be stored apart"
                    )
                self.plan[name] = replace(self.plan[places[1]])
            self.untied.append(name)

    def _place(self, name: str, change: Change) -> None:
        """Plan the change of a parameter, which is a stored tensor or made of several."""
        stored = self._stored(name)
        if stored is not None:
            planned = self.plan[stored]
            planned.parameter = name
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
        self._made_of[name] = parts
        for part in parts:  # made one after another
            self.plan[part] = replace(self.plan.pop(part), parameter=name)

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


def _read_changes(
    folder: Path, base: BaseModel, dtype: torch.dtype | None, rounding: str
) -> dict[str, Change]:
    """Read how an SMoA or HiRA adapter changes parameters, by the base model's names."""
    if read_config(folder, (METHOD, HIRA))["peft_type"] == METHOD:
        adapter = read_adapter(folder)
        changes = {
            name.replace(".base_layer.", "."): _whole(tensor) for name, tensor in adapter.whole.items()
        }
        for name, blocks in adapter.layers.items():
            # For experts the file names the parameter itself.
            parameter = name if blocks.of_experts else f"{name}.weight"
            factors = adapter.of_layer(name)
            scaling = adapter.settings.for_layer(name).scaling
            changes[parameter] = _smoa_change(blocks, factors["smoa_A"], factors["smoa_B"], scaling)
        return changes
    layers, whole = read_hira(folder)
    changes = {name: _whole(tensor) for name, tensor in whole.items()}
    for name, (A, B) in layers.items():
        # fan_in_fan_out is not used: PEFT corrects it for each layer by the layer's class.
        swapped = base.stores_swapped(name, (B.shape[0], A.shape[1]))
        changes[f"{name}.weight"] = _hira_change(A, B, swapped=swapped, dtype=dtype, rounding=rounding)
    return changes


def _whole(tensor: Tensor) -> Change:
    return Change((tuple(tensor.shape),), lambda stored: tensor, is_whole=True)


def _smoa_change(blocks: LayerBlocks, A: Tensor, B: Tensor, scaling: float) -> Change:
    stack, matrices = A.shape[:-2], blocks.matrices()
    shape = matrices[0].partition.shape
    each = [*zip(matrices, A.view(-1, *A.shape[-2:]), B.view(-1, *B.shape[-2:]), strict=True)]

    def effective(stored: Tensor) -> Tensor:
        weights = stored if stack else [stored]
        merged = [_merged(*one, scaling, weight) for one, weight in zip(each, weights, strict=True)]
        return torch.stack(merged) if stack else merged[0]

    return Change(((*stack, *shape), (*stack, *shape[::-1])), effective)


def _merged(blocks: LayerBlocks, A: Tensor, B: Tensor, scaling: float, stored: Tensor) -> Tensor:
    """W_eff of one matrix, in its stored orientation, at least in float32."""
    weight, distance = blocks.orient(stored)
    if not distance <= TOLERANCE:
        raise ValueError(
            f"the adapter was trained over another base weight (it differs by about {distance:.0%}, the same base "
            f"in another precision by at most {TOLERANCE:.0%})"
        )
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    factors = A.to(wide.dtype), B.to(wide.dtype)
    s = scaling_tensor(scaling, wide.device)
    adapter = PackedAdapter(wide, *factors, blocks.partition, blocks.ranks, s, blocks.ranks.tolist())
    merged = eager.delta_weight(adapter).add_(wide)
    return merged if weight is stored else merged.T


def _hira_change(A: Tensor, B: Tensor, *, swapped: bool, dtype: torch.dtype | None, rounding: str) -> Change:
    def effective(stored: Tensor) -> Tensor:
        wide = torch.promote_types(stored.dtype, torch.float32)
        product = B.to(wide) @ A.to(wide)
        if swapped:
            product = product.T
        # PEFT rounds each of these steps to W0's dtype. This is done here only to equal it bit for bit.
        as_peft = rounding == "nearest" and dtype in (None, stored.dtype)
        weight = stored if as_peft else stored.to(wide)
        return weight + weight * product.to(weight.dtype)

    return Change(((B.shape[0], A.shape[1]), (A.shape[1], B.shape[0])), effective)


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
