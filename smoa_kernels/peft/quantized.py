"""Linear layers over a quantised base (QSMoA): W0 is dequantised for each product and freed after it.

Forward and backward each dequantise W0, so that only x, the factors and the seed are kept for backward, as for a plain
base.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..backends import resolve_backend
from ..definition.dropout import Dropout, draw_seed
from ..definition.packed import PackedAdapter
from ..definition.precision import without_autocast
from ..functional import smoa_linear
from ..operator import LinearCall, call_linear_backward

__all__ = ["dequantized_linear", "requantize"]

# Gives W0 (N, C) in a dtype within a `with` block.
Dequantized = Callable[[torch.dtype], AbstractContextManager[Tensor]]


def dequantized_linear(
    x: Tensor,
    weight: Dequantized,
    bias: Tensor | None,
    adapter: PackedAdapter,
    *,
    compute_dtype: torch.dtype | None,
    dropout_p: float,
    algorithm: str,
    backend: str,
) -> Tensor:
    """`y = x W0ᵀ + b + dropout(x) ΔWᵀ`, differentiable in x, the bias and the factors.

    Args:
        x: (..., C).
        weight: gives W0 (N, C) in a dtype, once in forward and once in backward.
        bias: (N,) or None.
        adapter: the adapter; its `weight` is not used.
        compute_dtype: the dtype to multiply in; autocast's, or x's, when None.

    Returns:
        (..., N) in x's dtype.
    """
    device = x.device.type
    if (
        compute_dtype is None
        and torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
    ):
        compute_dtype = torch.get_autocast_dtype(device)
    dtype = x.dtype if compute_dtype is None else compute_dtype
    A, B = adapter.A, adapter.B
    if A.dtype not in (dtype, torch.float32):
        A, B = A.to(dtype), B.to(dtype)
    seed = draw_seed(x.device) if dropout_p > 0 else None
    settings = {"dropout_p": dropout_p, "algorithm": algorithm, "backend": backend}
    bias = None if bias is None else bias.to(dtype)
    apply: Any = _DequantizedLinear.apply
    return cast(Tensor, apply(x.to(dtype), bias, A, B, seed, weight, adapter, settings)).to(x.dtype)


class _DequantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        seed: Tensor | None,
        weight: Dequantized,
        adapter: PackedAdapter,
        settings: dict[str, Any],
    ) -> Tensor:
        needs_factors = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        ctx.save_for_backward(x if needs_factors else None, A, B, seed, adapter.ranks, adapter.scaling)
        ctx.weight, ctx.partition, ctx.settings = weight, adapter.partition, settings
        ctx.block_ranks = adapter.block_ranks
        with without_autocast(x), weight(x.dtype) as W0:
            return smoa_linear(
                x,
                W0,
                bias,
                A,
                B,
                adapter.partition,
                adapter.ranks,
                scaling=adapter.scaling,
                block_ranks=adapter.block_ranks,
                dropout_seed=seed,
                **settings,
            )

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # With create_graph=True; W0 is gone by the second backward.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "second derivatives over a quantised base weight are not computed: call backward without "
                "create_graph=True, or load the base without quantisation"
            )
        x, A, B, seed, ranks, scaling = ctx.saved_tensors
        needs_x, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:4]
        backend = resolve_backend(ctx.settings["backend"], dy.device, dy.dtype, A.shape[0])
        with ctx.weight(dy.dtype) as W0:
            adapter = PackedAdapter(W0, A, B, ctx.partition, ranks, scaling, ctx.block_ranks)
            dropout = None if seed is None else Dropout(seed, ctx.settings["dropout_p"], 0, W0.shape[1])
            dx, dA, dB = call_linear_backward(dy, x, needs_x, LinearCall(adapter, dropout, backend))
        dbias = dy.flatten(0, -2).sum(0) if needs_bias else None
        gradients = (dx if needs_x else None, dbias, dA if needs_A else None, dB if needs_B else None)
        return (*gradients, None, None, None, None)


def requantize(layer: Any, weight: Tensor) -> nn.Module:
    """Quantise `weight` into a tuner layer's base layer as PEFT does; return a layer over the old quantised weight.

    If this is interrupted, the base layer is restored: PEFT removes the old weight before it has the new one.
    """
    base, holder = layer.get_base_layer(), layer.base_layer
    before, stored = twin(base), getattr(base, "weight", None)
    attributes = dict(vars(stored)) if stored is not None else {}
    try:
        layer.quantization_backend.set_base_weight(layer, weight)
    except BaseException:
        layer.base_layer = holder
        _replace(vars(base), vars(before))
        raise
    finally:
        if stored is not None:
            _replace(vars(stored), attributes)  # PEFT marks the old parameter as not quantised
    return before


def _replace(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    found.clear()
    found.update(wanted)


def twin(layer: nn.Module) -> nn.Module:
    """Copy a layer without copying its quantised tensors; the copy keeps them when the original is requantised."""
    other = copy.copy(layer)
    other._parameters = layer._parameters.copy()
    other._buffers = layer._buffers.copy()
    if hasattr(layer, "state"):  # bitsandbytes keeps the scales of 8-bit weights there
        other.state = copy.copy(layer.state)
    return other
