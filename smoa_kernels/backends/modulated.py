"""`modulate`: W_eff as a function of the factors, for layers that are not linear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..definition.observers import is_observed
from ..definition.packed import PackedAdapter
from ..definition.precision import without_autocast
from ..definition.thresholds import Place, round_weight
from . import eager, load_backend


def modulate(adapter: PackedAdapter, backend: str = "eager") -> Tensor:
    """Compute `W_eff = W0 ∘ (1 + s · mask ∘ (B A))`, (N, C) in W0's dtype, differentiable in A and B.

    It is the weight that :func:`linear` multiplies by; the derivative of its rounding counts as 1. A layer of any kind
    can compute with it, but a linear one is faster and leaner by :func:`linear`.

    Args:
        adapter: W0, the factors, their blocks and s.
        backend: the name of a resolved backend.
    """
    weight, A, B = adapter.weight, adapter.A, adapter.B
    with without_autocast(weight):
        if is_observed(A, B, weight):
            dtype = torch.promote_types(weight.dtype, torch.float32)
            A, B = adapter.expanded_factors(dtype)
            W_eff = torch.addcmul(weight.to(dtype), weight.to(dtype), B @ A)
            return _round(W_eff, weight.dtype, adapter.place.first)
        return _modulate(A, B, adapter, backend)


class _Round(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(W_eff: Tensor, dtype: torch.dtype, place: int) -> Tensor:
        return round_weight(W_eff, dtype, Place(place))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, dW: Tensor) -> tuple[Tensor | None, ...]:
        return dW.to(ctx.dtype), None, None


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor, adapter: PackedAdapter, backend: str) -> Tensor:
        ctx.adapter = replace(adapter, scaling=adapter.scaling.clone())
        ctx.save_for_backward(A, B, adapter.weight)
        return load_backend(backend).modulated_weight(adapter)

    @staticmethod
    def backward(ctx: Any, dW: Tensor) -> tuple[Any, ...]:
        A, B, weight = ctx.saved_tensors
        adapter = replace(ctx.adapter, weight=weight, A=A, B=B)
        if torch.is_grad_enabled() or is_observed(dW):  # a derivative of the gradients may be asked for
            pull: Any = torch.func.vjp(lambda A, B: modulate(replace(adapter, A=A, B=B)), A, B)[1]
            return *pull(dW), None, None
        with without_autocast(dW):  # as `eager.factor_gradients`, with dW's blocks for `dY_kᵀ X_k`
            return *eager.BlockGradient(adapter, dW).contract(), None, None


_round: Callable[..., Tensor] = _Round.apply
_modulate: Callable[..., Tensor] = _Modulate.apply
