"""Merges an adapter's folder into a base model's, tensor by tensor: no model is built, and one layer is in memory.

What an adapter does to a tensor: :mod:`smoa_kernels.peft.changes`. How a base stores it:
:mod:`smoa_kernels.peft.stored_names`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..checks import check_choice, check_path
from ..definition.precision import DTYPES, dtype_names
from .changes import Change, read_changes
from .folders import ModelFolder, read_json
from .rounding import round_stochastically
from .stored_names import StoredNames

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


@dataclass
class _Planned:
    """What a tensor of the merged model is made of.

    Attributes:
        stored: the base's tensor.
        dtype: the result's.
        given: the adapter's own tensor in place of the base's, where it holds a whole one.
        change: what the adapter does to it; None where nothing.
        part_of: the parameter that transformers makes of this tensor and others, where the adapter changes that.
    """

    stored: str
    shape: torch.Size
    dtype: torch.dtype
    given: Tensor | None = None
    change: Change | None = None
    part_of: str | None = None

    @property
    def changed(self) -> bool:
        """Whether the adapter changes it."""
        return any(how is not None for how in (self.given, self.change, self.part_of))


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
        self._folder = ModelFolder(self.base)
        self.config = self._read_config()
        self.plan = self._stored_tensors()
        self.untied: list[str] = []
        self._names = StoredNames(self._folder)
        # Of parameters that are made of several stored tensors: what the adapter does to them, and the parts of the
        # last one that were not asked for yet.
        self._changes: dict[str, Change] = {}
        self._parts: dict[str, Tensor] = {}
        given, changes = read_changes(self.adapter, self._folder, dtype, rounding)
        for name, tensor in given.items():
            self._find(name, [tuple(tensor.shape)]).given = tensor
        for name, change in changes.items():
            if self._names.find(name) is None and (parts := self._names.parts(name)):
                self._changes[name] = change
                for stored in parts:  # one after another from now on
                    self.plan[stored] = replace(self.plan.pop(stored), part_of=name)
                continue
            planned = self._find(name, change.shapes)
            if planned.dtype not in DTYPES:
                raise ValueError(f"{name} must be {dtype_names(DTYPES)} to be merged, got {planned.dtype}")
            planned.change = change
        if any(_stands_alone(name) for name in (*given, *changes)):
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
            value = cast(Tensor, self._folder.get(planned.stored)) if planned.given is None else planned.given
            if planned.change is not None:
                with _naming(name):
                    value = planned.change.effective(value)
        if (
            planned.changed
            and self.rounding == "stochastic"
            and planned.dtype in _HALF
            and value.dtype not in _HALF
        ):
            rounded = round_stochastically(value, planned.dtype, seed=self.seed, name=name)
        else:
            rounded = value.to(planned.dtype, copy=True, memory_format=torch.contiguous_format)
        if planned.changed and not _is_finite(rounded):
            raise ValueError(f"{name}: the merged tensor holds NaN or Inf in {dtype_names([planned.dtype])}")
        return rounded

    def _part(self, stored: str, name: str) -> Tensor:
        """A part of a parameter that the adapter changes; what is made for one part is kept for the others."""
        if stored not in self._parts:
            change = self._changes[name]
            with _naming(name):
                whole = self._names.assembled(name)
                if tuple(whole.shape) not in change.shapes:
                    raise ValueError(f"it has shape {tuple(whole.shape)}, and {change.shape} in the adapter")
                self._parts = self._names.taken_apart(name, change.effective(whole))
                if sorted(self._parts) != sorted(self._names.parts(name)):
                    raise ValueError(
                        "transformers cannot undo what it makes it of: merge with merge_and_unload()"
                    )
        return self._parts.pop(stored)

    def _read_config(self) -> dict[str, Any]:
        path = self.base / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"there is no config.json in {self.base}")
        config = read_json(path)
        quantised = config.get("quantization_config")
        if quantised is not None:
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            raise ValueError(
                f"{self.base} is quantised ({method}): merge into the model that it was quantised from, or save "
                "what model.dequantize() gives and merge into that"
            )
        return config

    def _stored_tensors(self) -> dict[str, _Planned]:
        plan = {}
        for name, tensor in self._folder.tensors():  # mapped: no value is read
            dtype = self.dtype if self.dtype is not None and tensor.dtype in DTYPES else tensor.dtype
            plan[name] = _Planned(name, tensor.shape, dtype)
        return plan

    def _find(self, name: str, shapes: Sequence[tuple[int, ...]]) -> _Planned:
        """The planned tensor that a parameter of the model is; of its own where it is tied to another."""
        names = self._names
        stored = name if name in self.plan else names.find(name)
        source = names.find(names.tied.get(name, "")) if stored is None else None
        if source is not None:
            if len(names.tied) > 1:
                raise ValueError(
                    f"the adapter changes {name} or what it is tied to, {source}, and {self.base} ties further "
                    "parameters to that: they cannot be stored apart"
                )
            self.plan[name] = replace(self.plan[source], given=None, change=None)
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
        names = self._names
        for name, source in names.tied.items():
            both = [self.plan.get(names.find(tied) or tied) for tied in (name, source)]
            if any(planned is not None and planned.changed for planned in both):
                self._find(name, [tuple(planned.shape) for planned in both if planned is not None])
                self.untied.append(name)


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
