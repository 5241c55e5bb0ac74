"""PEFT's HiRA layer with a forward by SMoA's operator.

    W_eff = W0 ∘ (1 + B A)     hira_B is B (N, r), hira_A is A (r, C)

An accelerated layer is PEFT's layer with another class, a subclass that has another `forward`. It adds no parameter and
no buffer, so state dict, files and everything that PEFT does with them are PEFT's. Where `forward` has no faster way,
it calls PEFT's.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from peft.tuners import hira
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers.pytorch_utils import Conv1D

from ...definition.arguments import autocast_enabled
from ...definition.packed import scaling_tensor
from ...definition.partition import BlockPartition
from ...functional import smoa_linear

__all__ = ["Accelerated", "AcceleratedLinear", "OneBlock"]


class OneBlock(NamedTuple):
    """What the operator takes beside the tensors that a layer has."""

    partition: BlockPartition
    scaling: Tensor
    ranks: dict[int, Tensor]  # by r: int32 (1,)

    def ranks_of(self, A: Tensor) -> Tensor:
        """The rank of an adapter; newly made for a sum of several."""
        ranks = self.ranks.get(A.shape[0])
        return _rank(A.shape[0], A.device) if ranks is None else ranks


@functools.lru_cache(maxsize=256)
def _one_block(out_features: int, in_features: int, device: torch.device) -> OneBlock:
    """The single block of layers of this shape, which share it."""
    partition = BlockPartition.contiguous((out_features, in_features), 1, device=device)
    return OneBlock(partition, scaling_tensor(1.0, device), {})


def _rank(r: int, device: torch.device) -> Tensor:
    return torch.full((1,), r, dtype=torch.int32, device=device)


class Accelerated(nn.Module):
    """Stands before one of PEFT's HiRA classes among a layer's classes, and computes what the operator can.

    Attributes:
        pefts_class: the class of PEFT that the layer had, and will have again.
    """

    pefts_class: type[nn.Module]
    _block: OneBlock | None  # None while the weight is on the meta device

    # PEFT's.
    base_layer: Any
    hira_A: nn.ParameterDict
    hira_B: nn.ParameterDict
    hira_dropout: nn.ModuleDict
    r: dict[str, int]
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    fan_in_fan_out: bool
    in_features: int
    out_features: int

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute (..., C) -> (..., N), in x's dtype.

        Args:
            x: floating point, any leading dimensions.
            args, kwargs: passed to the base layer; PEFT's forward computes a call that has any.
        """
        block = self._block
        if block is not None and not (args or kwargs or self.disable_adapters or self.merged):
            names = [name for name in self.active_adapters if name in self.hira_A]
            dropout_p = self._dropout_p(names)
            if names and dropout_p is not None and self._skips_base_layer(x, block):
                factors = self._factors(names, x)
                if factors is not None:
                    return self._product(x, *factors, block, dropout_p)
        return cast(Tensor, super().forward(x, *args, **kwargs))

    def _skips_base_layer(self, x: Tensor, block: OneBlock) -> bool:
        """Whether the base layer's product with x can be computed without calling the base layer."""
        base = self.base_layer
        return (
            base.weight.device == block.scaling.device == x.device
            # A hook, which is registered on the layer, wants it to be called.
            and not (base._forward_hooks or base._forward_pre_hooks)
            and not (base._backward_hooks or base._backward_pre_hooks)
            and self._weight_fits(x)
        )

    def _weight_fits(self, x: Tensor) -> bool:
        weight = self.base_layer.weight
        return not weight.requires_grad and (weight.dtype == x.dtype or autocast_enabled(x))

    def _product(self, x: Tensor, A: Tensor, B: Tensor, block: OneBlock, dropout_p: float) -> Tensor:
        base = self.base_layer
        return smoa_linear(
            x,
            base.weight.T if self.fan_in_fan_out else base.weight,
            base.bias,
            A,
            B,
            block.partition,
            block.ranks_of(A),
            scaling=block.scaling,
            dropout_p=dropout_p,
            block_ranks=[A.shape[0]],
        )

    def make_ready(self) -> None:
        """Make what forward needs beside the layer's tensors: now, since forward may be compiled."""
        weight = self.base_layer.weight
        self._block = None
        if weight.is_meta:
            return
        # Kept for later calls, so these are usual tensors, whatever mode this call is made in.
        with torch.inference_mode(False), _disable_current_modes():
            self._block = _one_block(self.out_features, self.in_features, weight.device)
            for r in self.r.values():
                if r not in self._block.ranks:
                    self._block.ranks[r] = _rank(r, weight.device)

    def give_back(self) -> None:
        """Take away what was made for forward: the layer is about to be PEFT's."""
        del self._block

    @staticmethod
    @abstractmethod
    def obstacle(base: nn.Module) -> str | None:
        """Why a layer over this base layer stays PEFT's; None where it can be accelerated."""

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, as PEFT does."""
        super().update_layer(*args, **kwargs)  # type: ignore[misc]  # PEFT's class, which comes next, has it
        self.make_ready()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self.make_ready()
        return self

    def _dropout_p(self, names: Sequence[str]) -> float | None:
        """The probability to drop with; None where PEFT has to: it draws a mask for each adapter."""
        total = 0.0
        for name in names:
            module = self.hira_dropout[name]
            if type(module) is nn.Dropout:
                total += module.p if module.training else 0.0
            elif type(module) is not nn.Identity:
                return None
        return total if total == 0 or (len(names) == 1 and total < 1) else None

    def _factors(self, names: Sequence[str], x: Tensor) -> tuple[Tensor, Tensor] | None:
        """A (r, C) and B (N, r) of the sum of adapters; None where the operator does not take their dtypes."""
        As, Bs = [self.hira_A[name] for name in names], [self.hira_B[name] for name in names]
        dtypes = {factor.dtype for factor in (*As, *Bs)}
        if len(dtypes) > 1 or not dtypes <= {x.dtype, torch.float32}:
            return None
        return (As[0], Bs[0]) if len(names) == 1 else (torch.cat(As), torch.cat(Bs, 1))


_PLAIN_TYPES = (Tensor, nn.Parameter)


class AcceleratedLinear(Accelerated, hira.Linear):  # type: ignore[misc]  # PEFT's types are not followed
    """PEFT's HiRA layer over an `nn.Linear` or a `Conv1D`.

    :func:`accelerate_hira` gives a layer this class; none is constructed.
    """

    pefts_class = hira.Linear

    @staticmethod
    def obstacle(base: nn.Module) -> str | None:
        """Why the weight cannot be multiplied with in the base layer's place; None where it can."""
        if type(base) is not Conv1D and getattr(type(base), "forward", None) is not nn.Linear.forward:
            return f"its base layer {type(base).__qualname__} may compute something else than a product"
        if type(base.weight) not in _PLAIN_TYPES:
            return f"its base weight is a {type(base.weight).__qualname__}, not a plain tensor"
        return None
