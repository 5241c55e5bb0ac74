"""PEFT's HiRA layer with a forward by SMoA's operator.

    W_eff = W0 ∘ (1 + B A)     hira_B is B (N, r), hira_A is A (r, C)

An accelerated layer is PEFT's layer with its class replaced by a subclass with another `forward`. It adds no parameter
or buffer, so state dict and files stay PEFT's. Where the operator cannot compute a call, `forward` calls PEFT's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners import hira
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ...definition.packed import PackedAdapter, scaling_tensor
from ...definition.partition import BlockPartition
from ...definition.precision import autocast_enabled
from ...functional import adapted_linear
from ..dequantize import keep_packing, read_weight
from ..quantized import dequantized_linear


@functools.lru_cache(maxsize=256)
def _one_block(out_features: int, in_features: int, device: torch.device) -> tuple[BlockPartition, Tensor]:
    """The single block and the scale 1 of layers of this shape, which share them."""
    partition = BlockPartition.contiguous((out_features, in_features), 1, device=device)
    return partition, scaling_tensor(1.0, device)


def _rank(r: int, device: torch.device) -> Tensor:
    return torch.full((1,), r, dtype=torch.int32, device=device)


_Layer: Any = nn.Module  # Any, since it is mixed into PEFT's layer and has that one's attributes


class Accelerated(_Layer):  # type: ignore[misc]
    """A mixin for PEFT's HiRA classes whose forward uses the operator where that is possible.

    Attributes:
        pefts_class: PEFT's class of the layer, which :func:`decelerate_hira` restores.
        is_quantized: whether that class is for bitsandbytes' layers, whose W0 is dequantised for each product.
    """

    pefts_class: type[nn.Module]
    is_quantized: bool
    _block: tuple[BlockPartition, Tensor] | None = None  # None while the weight is on the meta device
    _ranks: dict[int, Tensor]  # int32 (1,), by r
    _repacks = False  # whether bitsandbytes was to repack the weight for the CPU

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute (..., C) -> (..., N), in x's dtype.

        Args:
            x: floating point, any leading dimensions.
            args, kwargs: passed to the base layer; PEFT's forward computes a call that has any.
        """
        if self._block is not None and not (args or kwargs or self.disable_adapters or self.merged):
            names = [name for name in self.active_adapters if name in self.hira_A]
            dropout_p = self._dropout_p(names)
            if names and dropout_p is not None and self._skips_base_layer(x):
                factors = self._factors(names, x)
                if factors is not None:
                    return self._product(x, *factors, dropout_p)
        return cast(Tensor, super().forward(x, *args, **kwargs))

    def _skips_base_layer(self, x: Tensor) -> bool:
        """Whether the base layer's product with x can be computed without calling the base layer."""
        base, (_, scaling) = self.base_layer, cast(Any, self._block)
        weight = base.weight
        fits = not weight.requires_grad and (weight.dtype == x.dtype or autocast_enabled(x))
        return (
            weight.device == scaling.device == x.device
            # Hooks on the layer run only if it is called.
            and not (base._forward_hooks or base._forward_pre_hooks)
            and not (base._backward_hooks or base._backward_pre_hooks)
            and (self.is_quantized or fits)
        )

    def _product(self, x: Tensor, A: Tensor, B: Tensor, dropout_p: float) -> Tensor:
        base, (partition, scaling), r = self.base_layer, cast(Any, self._block), A.shape[0]
        ranks = self._ranks[r] if r in self._ranks else _rank(r, A.device)  # newly made for a sum of several
        weight = base.weight.T if self.fan_in_fan_out else base.weight
        adapter = PackedAdapter(weight, A, B, partition, ranks, scaling, [r])
        if not self.is_quantized:
            return adapted_linear(x, base.bias, adapter, dropout_p=dropout_p)
        read = functools.partial(read_weight, resolve_quantization_backend(base), base)
        return dequantized_linear(x, base, read, adapter, dropout_p=dropout_p)

    def make_ready(self) -> None:
        """Make the tensors that forward needs beside the layer's own: now, because forward may be compiled."""
        base = self.base_layer
        self._repacks = self._repacks or getattr(base, "support_avx512bf16_for_cpu", False)
        keep_packing(base)
        self._block = None
        if base.weight.is_meta:
            return
        # Kept for later calls, so they must be ordinary tensors even if this call is in inference mode.
        with torch.inference_mode(False), _disable_current_modes():
            self._block = _one_block(self.out_features, self.in_features, base.weight.device)
            self._ranks = {r: _rank(r, base.weight.device) for r in self.r.values()}

    def give_back(self) -> None:
        """Make the layer PEFT's again: remove the tensors made for forward and restore its class."""
        if self._repacks:
            self.base_layer.support_avx512bf16_for_cpu = True
        for made in ("_block", "_ranks", "_repacks"):
            self.__dict__.pop(made, None)
        self.__class__ = self.pefts_class  # type: ignore[assignment]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)
        self.make_ready()
        return self

    def _dropout_p(self, names: Sequence[str]) -> float | None:
        """The dropout probability; None if PEFT has to compute, because each adapter draws a mask."""
        total = 0.0
        for name in names:
            module = self.hira_dropout[name]
            if type(module) is nn.Dropout:
                total += module.p if module.training else 0.0
            elif type(module) is not nn.Identity:
                return None
        return total if total == 0 or (len(names) == 1 and total < 1) else None

    def _factors(self, names: Sequence[str], x: Tensor) -> tuple[Tensor, Tensor] | None:
        """A (r, C) and B (N, r) of the sum of adapters; None if the operator does not take their dtypes."""
        As, Bs = [self.hira_A[name] for name in names], [self.hira_B[name] for name in names]
        dtypes = {factor.dtype for factor in (*As, *Bs)}
        if len(dtypes) > 1 or not dtypes <= {x.dtype, torch.float32}:
            return None
        return (As[0], Bs[0]) if len(names) == 1 else (torch.cat(As), torch.cat(Bs, 1))


@functools.cache
def accelerated_class(kind: type[nn.Module]) -> type[Accelerated]:
    """The class for layers of one of PEFT's HiRA classes: `hira.Linear`, or one over bitsandbytes' layers.

    :func:`accelerate_hira` sets it on an existing layer; it is never constructed.
    """
    facts = {"pefts_class": kind, "is_quantized": kind is not hira.Linear, "__module__": __name__}
    return type(f"Accelerated{kind.__name__}", (Accelerated, kind), facts)


def __getattr__(name: str) -> Any:
    """Find these classes by name, for pickle."""
    kind = name.removeprefix("Accelerated")
    if kind in ("Linear", "Linear8bitLt", "Linear4bit"):
        return accelerated_class(getattr(hira, kind))
    raise AttributeError(name)
