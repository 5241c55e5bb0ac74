"""Merges an adapter's folder into a base model's, tensor by tensor: no model is built, and one layer is in memory.

A further kind of adapted tensor is one more function that returns a `Change`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends import eager
from ..checks import check_choice, check_path
from ..definition.packed import PackedAdapter, scaling_tensor
from ..definition.precision import DTYPES, dtype_names
from ..definition.sketch import TOLERANCE
from .base_model import BaseModel
from .format import LayerBlocks, StackBlocks
from .reading import (
    HIRA,
    METHOD,
    PREFIX,
    hira_layers,
    read_adapter,
    read_config,
    read_json,
    read_state,
    weights_of,
)
from .rounding import round_stochastically

__all__ = ["ROUNDINGS", "FolderMerge", "merged_weights"]

ROUNDINGS = ("nearest", "stochastic")

# What is rounded stochastically; others hold what training changed.
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
            quantised or lacks what the adapter changes; or, once a tensor is reached, it is another than the adapter
            was trained over, or the result is not finite. The message names the tensor.

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
    """What an adapter does to a parameter.

    Attributes:
        shapes: those in which W0 may be stored, the adapter's own, (N, C) or (E, N, C), first.
        effective: makes W_eff of W0, both as they are stored, which may be transposed. W_eff is float32 or wider, or
            where W0 is to be changed as PEFT does it, in W0's dtype. Raises ValueError where W0 is another weight than
            the adapter was trained over.
        is_whole: the adapter holds the parameter itself, and W0 is not read.
    """

    shapes: tuple[tuple[int, ...], ...]
    effective: Callable[[Tensor], Tensor]
    is_whole: bool = False


@dataclass
class _Planned:
    """What a tensor of the merged model is made of.

    Attributes:
        stored: the base's tensor.
        dtype: the result's.
        change: what the adapter does to it; None where nothing.
        part_of: the parameter that transformers makes of this tensor and others, where the adapter changes that.
    """

    stored: str
    shape: torch.Size
    dtype: torch.dtype
    change: Change | None = None
    part_of: str | None = None

    @property
    def changed(self) -> bool:
        """Whether the adapter changes it."""
        return self.change is not None or self.part_of is not None


class FolderMerge:
    """A merge of an adapter's folder into a base model's, checked and ready; see :func:`merged_weights`.

    Attributes:
        base, adapter: the folders.
        config: the base's configuration.
        plan: what each tensor is made of, in the order of the base's files.
        untied: names of tensors that the base stores as another one, and that are stored of their own now.
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
        # Of parameters that are made of several stored tensors: what the adapter does to them, and the parts of the
        # last one that were not asked for yet.
        self._changes: dict[str, Change] = {}
        self._parts: dict[str, Tensor] = {}
        changes = _read_changes(self.adapter, self._model, dtype, rounding)
        for name, change in changes.items():
            self._place(name, change)
        if any(_stands_alone(name) for name in changes):
            self._untie()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.plan:
            yield name, self.tensor(name)

    def tensor(self, name: str) -> Tensor:
        """Make one tensor of the merged model, in memory of its own.

        Raises:
            ValueError: naming it: the base's is another than the adapter was trained over, or the result is not finite.
        """
        planned = self.plan[name]
        if planned.part_of is not None:
            value = self._part(planned.stored, planned.part_of)
        else:
            value = self._model.read(planned.stored)
            if planned.change is not None:
                with _naming(name):
                    value = planned.change.effective(value)
        narrowed = planned.dtype in _HALF and value.dtype not in _HALF
        if planned.changed and narrowed and self.rounding == "stochastic":
            rounded = round_stochastically(value, planned.dtype, seed=self.seed, name=name)
        else:
            rounded = value.to(planned.dtype, copy=True, memory_format=torch.contiguous_format)
        if planned.changed and not _is_finite(rounded):
            raise ValueError(f"{name}: the merged tensor holds NaN or Inf in {dtype_names([planned.dtype])}")
        return rounded

    def _part(self, stored: str, name: str) -> Tensor:
        """A part of a parameter that the adapter changes; what is made for one part is kept for the others."""
        if stored not in self._parts:
            change, architecture = self._changes[name], self._model.architecture
            with _naming(name):
                whole = self._model.assembled(name)
                if tuple(whole.shape) not in change.shapes:
                    raise ValueError(
                        f"it has shape {tuple(whole.shape)}, and {change.shapes[0]} in the adapter"
                    )
                self._parts = architecture.take_apart(name, change.effective(whole))
                if sorted(self._parts) != sorted(architecture.parts[name]):
                    raise ValueError(
                        "transformers cannot undo what it makes it of: merge with merge_and_unload()"
                    )
        return self._parts.pop(stored)

    def _place(self, name: str, change: Change) -> None:
        """Plan the change of a parameter."""
        is_stored = change.is_whole or self._model.stored_name(name) is not None
        parts = [] if is_stored else self._model.architecture.parts.get(name, [])
        for stored in parts:  # one after another from now on
            self._changes[name] = change
            self.plan[stored] = replace(self.plan.pop(stored), part_of=name)
        if parts:
            return
        planned = self._find(name, change.shapes)
        if not change.is_whole and planned.dtype not in DTYPES:
            raise ValueError(f"{name} must be {dtype_names(DTYPES)} to be merged, got {planned.dtype}")
        planned.change = change

    def _find(self, name: str, shapes: tuple[tuple[int, ...], ...]) -> _Planned:
        """The planned tensor that a parameter of the model is; of its own where it is tied to another."""
        stored = name if name in self.plan else self._model.stored_name(name)
        tied = {} if stored is not None else self._model.architecture.tied
        source = self._model.stored_name(tied[name]) if name in tied else None
        if source is not None:
            if len(tied) > 1:
                raise ValueError(
                    f"the adapter changes {name} or what it is tied to, {source}, and {self.base} ties further "
                    "parameters to that: they cannot be stored apart"
                )
            self.plan[name] = replace(self.plan[source], change=None)
            stored = name
        if stored is None:
            raise ValueError(
                f"{self.base} stores no {name}, which the adapter changes. A new head: save the base with it first. A "
                "parameter that transformers makes of others as it loads the base: merge with merge_and_unload()"
            )
        planned = self.plan[stored]
        if tuple(planned.shape) not in shapes:
            raise ValueError(
                f"{name} has shape {tuple(planned.shape)} in {self.base}, and {' or '.join(map(str, shapes))} in the "
                "adapter. If tokens were added, resize the base's embeddings as before training and save it first"
            )
        return planned

    def _untie(self) -> None:
        """Let parameters that were tied, of which the adapter changes one, each be stored of their own."""
        for name, source in self._model.architecture.tied.items():
            both = [self.plan.get(self._model.stored_name(tied) or tied) for tied in (name, source)]
            known = [planned for planned in both if planned is not None]
            if any(planned.changed for planned in known):
                self._find(name, tuple(tuple(planned.shape) for planned in known))
                self.untied.append(name)


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
            "what model.dequantize() gives and merge into that"
        )
    return config


def _read_changes(
    folder: Path, base: BaseModel, dtype: torch.dtype | None, rounding: str
) -> dict[str, Change]:
    """Read what an SMoA or HiRA adapter does to parameters, by the base model's names.

    Args:
        folder: the adapter.
        base: the base model.
        dtype: of the merged model; its own where None.
        rounding: how W_eff will be rounded to it, "nearest" or "stochastic".

    Raises:
        ValueError, FileNotFoundError: a file is missing or cannot be read, or holds no adapted layer.
    """
    if read_config(folder, (METHOD, HIRA))["peft_type"] == METHOD:
        adapter = read_adapter(folder)
        changes = {
            name.replace(".base_layer.", "."): _whole(tensor) for name, tensor in adapter.whole.items()
        }
        for name, blocks in adapter.layers.items():
            A, B, _ = adapter.of_layer(name).values()
            scaling = adapter.settings.for_layer(name).scaling
            if isinstance(blocks, StackBlocks):  # named by the parameter itself
                changes[name] = _experts_change(blocks, A, B, scaling)
            else:
                changes[f"{name}.weight"] = _smoa_change(blocks, A, B, scaling)
    else:
        path = weights_of(folder)
        state = read_state(path)
        whole = {key.removeprefix(PREFIX): tensor for key, tensor in state.items() if ".hira_" not in key}
        changes = {name: _whole(tensor) for name, tensor in whole.items()}
        for name, (A, B) in hira_layers(path, state).items():
            # PEFT corrects the configuration's fan_in_fan_out by the layer's class, layer by layer.
            swapped = base.stores_swapped(name, (B.shape[0], A.shape[1]))
            changes[f"{name}.weight"] = _hira_change(A, B, swapped=swapped, dtype=dtype, rounding=rounding)
    return changes


def _whole(tensor: Tensor) -> Change:
    return Change((tuple(tensor.shape),), lambda stored: tensor, is_whole=True)


def _smoa_change(blocks: LayerBlocks, A: Tensor, B: Tensor, scaling: float) -> Change:
    partition, ranks, _ = blocks

    def effective(stored: Tensor) -> Tensor:
        weight, distance = blocks.facing(stored)
        if not distance <= TOLERANCE:
            raise ValueError(
                f"the adapter was trained over another base weight (it differs by about {distance:.0%}, the same base "
                f"in another precision by at most {TOLERANCE:.0%})"
            )
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        factors = A.to(wide.dtype), B.to(wide.dtype)
        s = scaling_tensor(scaling, wide.device)
        adapter = PackedAdapter(wide, *factors, partition, ranks, s, ranks.tolist())
        merged = eager.delta_weight(adapter).add_(wide)
        return merged if weight is stored else merged.T

    return Change((partition.shape, partition.shape[::-1]), effective)


def _experts_change(blocks: StackBlocks, A: Tensor, B: Tensor, scaling: float) -> Change:
    each = [_smoa_change(*expert, scaling) for expert in zip(blocks.experts(), A, B, strict=True)]

    def effective(stored: Tensor) -> Tensor:
        return torch.stack([change.effective(weight) for change, weight in zip(each, stored, strict=True)])

    return Change(((len(each), *blocks.shape), (len(each), *blocks.shape[::-1])), effective)


def _hira_change(A: Tensor, B: Tensor, *, swapped: bool, dtype: torch.dtype | None, rounding: str) -> Change:
    def effective(stored: Tensor) -> Tensor:
        wide = torch.promote_types(stored.dtype, torch.float32)
        product = B.to(wide) @ A.to(wide)
        if swapped:
            product = product.T
        # PEFT rounds each of these steps to W0's dtype. Only to equal it bit for bit is that done here.
        as_peft = rounding == "nearest" and dtype in (None, stored.dtype)
        weight = stored if as_peft else stored.to(wide)
        return weight + weight * product.to(weight.dtype)

    return Change(((B.shape[0], A.shape[1]), (A.shape[1], B.shape[0])), effective)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _is_finite(tensor: Tensor) -> bool:
    # By the extremes, which a NaN is among: `isfinite` of the whole takes as much memory again.
    return not tensor.numel() or all(math.isfinite(value) for value in tensor.aminmax())


def _stands_alone(name: str) -> bool:
    """Whether a parameter is none of a numbered layer's, so that another may be tied to it."""
    return not any(part.isdigit() for part in name.split("."))
