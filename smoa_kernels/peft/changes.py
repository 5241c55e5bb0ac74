"""Reads from an adapter's folder what merging it does to each tensor of its base model.

A further kind of adapted tensor is one more function that returns a `Change`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import PeftType
from torch import Tensor

from ..backends import eager
from ..definition.packed import PackedAdapter, scaling_tensor
from ..definition.sketch import TOLERANCE
from .convert import hira_layers
from .file_format import LayerBlocks, StackBlocks
from .folders import PREFIX, ModelFolder, read_config, read_layers, read_state, weights_of
from .peft_type import PEFT_TYPE

__all__ = ["Change", "read_changes"]


@dataclass(frozen=True)
class Change:
    """What an adapter does to a tensor.

    Attributes:
        shape: (N, C), or (E, N, C) of the fused weight of experts.
        effective: makes W_eff of W0, both as they are stored, which may be transposed. W_eff is float32 or wider, or
            where W0 is to be changed as PEFT does it, in W0's dtype. Raises ValueError where W0 is another weight than
            the adapter was trained over.
    """

    shape: tuple[int, ...]
    effective: Callable[[Tensor], Tensor]

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes in which W0 may be stored."""
        *experts, rows, columns = self.shape
        return self.shape, (*experts, columns, rows)


def read_changes(
    folder: Path, base: ModelFolder, dtype: torch.dtype | None, rounding: str
) -> tuple[dict[str, Tensor], dict[str, Change]]:
    """Read an SMoA or HiRA adapter: tensors that it holds whole, and changes, both by the base model's names.

    Args:
        folder: the adapter.
        base: of the base model.
        dtype: of the merged model; its own where None.
        rounding: how W_eff will be rounded to it, "nearest" or "stochastic".

    Raises:
        ValueError, FileNotFoundError: a file is missing or cannot be read, or holds no adapted layer.
    """
    config: Any = read_config(folder, (PEFT_TYPE, PeftType.HIRA))
    path = weights_of(folder)
    state = read_state(path)
    given = {
        key.removeprefix(PREFIX).replace(".base_layer.", "."): tensor
        for key, tensor in state.items()
        if ".smoa_" not in key and ".hira_" not in key
    }
    changes = {}
    if config.peft_type == PEFT_TYPE:
        for name, blocks in read_layers(path, lambda name: config.for_layer(name).r).items():
            A, B = (state[f"{PREFIX}{name}.smoa_{factor}"] for factor in "AB")
            scaling = config.for_layer(name).scaling
            if isinstance(blocks, StackBlocks):  # named by the parameter itself
                changes[name] = _experts_change(blocks, A, B, scaling)
            else:
                changes[f"{name}.weight"] = _smoa_change(blocks, A, B, scaling)
    else:
        for name, (A, B) in hira_layers(path, state).items():
            # PEFT corrects the configuration's fan_in_fan_out by the layer's class, layer by layer.
            swapped = base.stores_swapped(name, (B.shape[0], A.shape[1]))
            changes[f"{name}.weight"] = _hira_change(A, B, swapped=swapped, dtype=dtype, rounding=rounding)
    if not changes:
        raise ValueError(f"{path} holds no layer of an adapter")
    return given, changes


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

    return Change(partition.shape, effective)


def _experts_change(blocks: StackBlocks, A: Tensor, B: Tensor, scaling: float) -> Change:
    each = [_smoa_change(*expert, scaling) for expert in zip(blocks.experts(), A, B, strict=True)]

    def effective(stored: Tensor) -> Tensor:
        return torch.stack([change.effective(weight) for change, weight in zip(each, stored, strict=True)])

    return Change((len(each), *blocks.shape), effective)


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

    return Change((B.shape[0], A.shape[1]), effective)
