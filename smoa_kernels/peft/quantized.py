"""The product of an adapted linear layer, over a plain W0 or over a quantised one (QSMoA).

A quantised W0 is dequantised for each product and freed after it: forward and backward each dequantise it, so that only
x, the factors and the seed are kept for backward, as for a plain base.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..adapter_folder.quantized import group_multiplier
from ..backends import resolve_backend
from ..definition.dropout import Dropout, draw_seed
from ..definition.labels import of_columns
from ..definition.packed import PackedAdapter
from ..definition.precision import autocast_enabled, without_autocast
from ..functional import adapted_linear, cast_factors
from ..operators.linear import LinearCall, linear_gradients

# Gives W0 (N, C), newly allocated, in a dtype.
ReadWeight = Callable[[torch.dtype], Tensor]


def dequantized_linear(
    x: Tensor, base: Any, read: ReadWeight, adapter: PackedAdapter, **settings: Any
) -> Tensor:
    """`adapted_linear` over a quantised layer `base`, in its compute dtype if it has one; differentiable once.

    x is (..., C), the result (..., N) in x's dtype. The adapter's `weight` is not used: `read` gives W0. `settings` are
    `dropout_p`, `algorithm` and `backend` of :func:`smoa_kernels.smoa_linear`.
    """
    dtype = getattr(base, "compute_dtype", None)
    if dtype is None:
        dtype = torch.get_autocast_dtype(x.device.type) if autocast_enabled(x) else x.dtype
    adapter = cast_factors(adapter, dtype)
    A, B = adapter.A, adapter.B
    bias = None if base.bias is None else base.bias.to(dtype)
    seed = draw_seed(x.device) if settings["dropout_p"] > 0 else None
    apply: Any = _DequantizedLinear.apply
    return cast(Tensor, apply(x.to(dtype), bias, A, B, seed, read, adapter, settings)).to(x.dtype)


class _DequantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, *call: Any) -> Tensor:
        seed, read, adapter, settings = call
        needs_factors = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        ctx.save_for_backward(x if needs_factors else None, A, B, seed, adapter.ranks, adapter.scaling)
        ctx.read, ctx.partition, ctx.settings = read, adapter.partition, settings
        ctx.block_ranks = adapter.block_ranks
        with without_autocast(x):
            given = replace(adapter, weight=read(x.dtype), A=A, B=B)
            return adapted_linear(x, bias, given, dropout_seed=seed, **settings)

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
        backend = resolve_backend(ctx.settings.get("backend", "auto"), dy.device, dy.dtype, A.shape[0])
        adapter = PackedAdapter(ctx.read(dy.dtype), A, B, ctx.partition, ranks, scaling, ctx.block_ranks)
        dropout = None if seed is None else Dropout(seed, ctx.settings["dropout_p"])
        call = LinearCall(adapter, dropout, backend)
        dx, dA, dB = linear_gradients(dy, x, call, needs_x=needs_x)
        dbias = torch.atleast_2d(dy).flatten(0, -2).sum(0) if needs_bias else None
        gradients = (dx if needs_x else None, dbias, dA if needs_A else None, dB if needs_B else None)
        return (*gradients, None, None, None, None)


def rescale(layer: Any, adapters: Sequence[Adapter]) -> nn.Module | None:
    """Merge adapters into a 4-bit weight of bitsandbytes without quantising anew: multiply its scales.

    That is exact if an adapter's multiplier is one number for all columns that share a scale.

    Returns:
        A layer over the old scales; None where the weight is another, or its scales are not those of the groups.
    """
    base = layer.get_base_layer()
    weight: Any = getattr(layer._stored_layer[0] if layer._stored_layer else base, "weight", None)
    state: Any = getattr(weight, "quant_state", None)
    size, columns = getattr(state, "blocksize", 0), layer.in_features
    groups = [adapter.group_size for adapter in adapters]
    mapped = any(adapter.col_group is not None for adapter in adapters)
    if mapped or not size or columns % size or any(group % size and group < columns for group in groups):
        return None
    functional, before = importlib.import_module("bitsandbytes.functional"), _twin(base)
    multiplier = torch.ones(layer.out_features, columns // size, device=state.absmax.device)
    for adapter, group in zip(adapters, groups, strict=True):
        multiplier += of_columns(group_multiplier(adapter) - 1, -(-group // size), columns // size)
    scales = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
    new = copy.copy(state)
    new.absmax, new.nested, new.state2, new.offset = scales.float() * multiplier.flatten(), False, None, None
    held = dict(vars(weight), quant_state=new, compress_statistics=False)
    scaled: Any = torch.Tensor._make_subclass(type(weight), weight.data, False)
    vars(scaled).update(held)
    try:
        base.weight, base.quant_state = scaled, new
    except BaseException:  # Ctrl-C too
        _replace(vars(base), vars(before))
        raise
    return before


def requantize(layer: Any, weight: Tensor) -> nn.Module:
    """Quantise `weight` into a tuner layer's base layer as PEFT does; return a layer over the old quantised weight.

    If this is interrupted, the base layer is restored: PEFT removes the old weight before it has the new one.
    """
    base, holder = layer.get_base_layer(), layer.base_layer
    before, stored = _twin(base), getattr(base, "weight", None)
    attributes = dict(vars(stored)) if stored is not None else {}
    try:
        layer.quantization_backend.set_base_weight(layer, weight)
    except BaseException:
        layer.base_layer = holder
        _replace(vars(base), vars(before))
        raise
    finally:
        if stored is not None:  # PEFT marks the old parameter as not quantised
            _replace(vars(stored), attributes)
    return before


def _replace(attributes: dict[str, Any], values: dict[str, Any]) -> None:
    attributes.clear()
    attributes.update(values)


def _twin(layer: nn.Module) -> nn.Module:
    """Copy a layer without copying its quantised tensors; the copy keeps them when the original is requantised."""
    other = copy.copy(layer)
    other._parameters = layer._parameters.copy()
    other._buffers = layer._buffers.copy()
    if hasattr(layer, "state"):  # bitsandbytes keeps the scales of 8-bit weights there
        other.state = copy.copy(layer.state)
    return other
