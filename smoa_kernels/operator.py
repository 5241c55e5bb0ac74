"""The `smoa::linear` operator, its gradient and their fake forms.

The operator is opaque to compilers, for two reasons. No pass may reorder its additions: in half precision the
adapter's output survives only if it enters before the base GEMM's one rounding. And no graph bakes in what may
change between calls: scaling and dropout seed cross as tensors, and "auto" is decided inside, where the graph
does not see the token count.

It is registered through `torch.library`'s dispatcher keys with an `autograd.Function` of our own, which has half the
Python overhead of `custom_op`; small layers feel it. Where nothing watches operators, the dispatcher is left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backends import load_backend
from .definition.arguments import check_ranks
from .definition.linear_call import SCHEMA, LinearCall
from .definition.packed import PackedAdapter
from .derivatives import (
    DifferentiableBackward,
    DifferentiableLinear,
    Gradients,
    Passes,
    formula,
    formula_gradients,
)

__all__ = ["LinearCall", "call_linear", "call_linear_backward", "linear", "linear_backward"]


_unsafe_view: Any = torch.ops.aten._unsafe_view.default

_LIBRARY = torch.library.Library("smoa", "DEF")
_LIBRARY.define(f"linear(Tensor x, Tensor? bias, str algorithm, {SCHEMA}) -> Tensor")
_LIBRARY.define(
    f"linear_backward(Tensor dy, Tensor? x, bool needs_x, {SCHEMA}) -> (Tensor dx, Tensor dA, Tensor dB)"
)
linear: Any = torch.ops.smoa.linear.default
linear_backward: Any = torch.ops.smoa.linear_backward.default

Pass = Callable[[Any, Any, Any, LinearCall], Any]
"""Computes the forward from (x, bias, algorithm, call), or the backward from (dy, x, needs_x, call)."""


def call_linear(x: Tensor, bias: Tensor | None, algorithm: str, call: LinearCall) -> Tensor:
    """Compute what the operator `linear` computes, without the dispatcher where nothing would see it.

    The dispatcher's two passes convert every argument: 3 % of a small layer's time (CPU, T=128, 384x1536).

    Args:
        x: (..., C); y is (..., N) in its dtype.
        bias: (N,) or None.
        algorithm: "auto" or one that the call's backend has.
        call: the rest.
    """
    skip = can_skip_dispatcher(x, call.adapter.weight, bias, call.adapter.A, call.adapter.B)
    y: Tensor = (_recorded_forward if skip else _watched_forward)(x, bias, algorithm, call)
    return y


def call_linear_backward(dy: Tensor, x: Tensor | None, needs_x: bool, call: LinearCall) -> Gradients:
    """Compute what the operator `linear_backward` computes: (dX, dA, dB), empty where not needed.

    Args:
        dy: (..., N).
        x: (..., C), or None where neither dA nor dB is needed.
        needs_x: whether dX is needed.
        call: that of the forward.
    """
    skip = can_skip_dispatcher(dy, x, call.adapter.weight, call.adapter.A, call.adapter.B)
    found: Gradients = (_recorded_backward if skip else _watched_backward)(dy, x, needs_x, call)
    return found


def can_skip_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether no compiler, trace, mode, transform or profiler is on, and all tensors are plain memory."""
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    for one in tensors:
        if one is None:
            continue
        # The dispatcher does work of its own for others: it negates a conjugate's imaginary part, makes its zeros, ...
        if type(one) not in _PLAIN_TYPES:
            return False
        keys = torch._C._dispatch_keys(one).raw_repr()
        if keys not in _plain:
            if one.is_meta or keys not in _plain_keys(one.device.type):
                return False
            _plain.add(keys)
    return True


_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})
_plain: set[int] = set()  # keys of plain tensors that have been seen: they name the device's type


@functools.cache
def _plain_keys(device_type: str) -> frozenset[int]:
    """The dispatch keys of a tensor that is no more than its values, made in inference mode or not."""
    found = set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            found.add(torch._C._dispatch_keys(torch.empty(0, device=device_type)).raw_repr())
    return frozenset(found)


def _forward(x: Tensor, bias: Tensor | None, algorithm: str, call: LinearCall) -> Tensor:
    adapter = call.adapter
    check_ranks(adapter.ranks, adapter.block_ranks, adapter.A.shape[0])
    if adapter.weight.dtype != x.dtype:
        # Under autocast W0 is cast here, per call, so that no copy of it is saved for backward.
        adapter = replace(adapter, weight=adapter.weight.to(x.dtype))
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    y = load_backend(call.backend).forward(_as_matrix(x), bias, adapter, algorithm, call.dropout)
    return _with_leading_dimensions(y, x)


def _backward(dy: Tensor, x: Tensor | None, needs_x: bool, call: LinearCall) -> Gradients:
    adapter = call.adapter
    if adapter.weight.dtype != dy.dtype:
        adapter = replace(adapter, weight=adapter.weight.to(dy.dtype))
    dx, dA, dB = load_backend(call.backend).backward(
        _as_matrix(dy), None if x is None else _as_matrix(x), adapter, call.dropout, needs_x=needs_x
    )
    return (
        dy.new_empty(0) if dx is None else _with_leading_dimensions(dx, dy),
        adapter.A.new_empty(0) if dA is None else dA,
        adapter.B.new_empty(0) if dB is None else dB,
    )


def _forward_fake(x: Tensor, bias: Tensor | None, algorithm: str, call: LinearCall) -> Tensor:
    return x.new_empty(*x.shape[:-1], call.adapter.weight.shape[0])


def _backward_fake(dy: Tensor, x: Tensor | None, needs_x: bool, call: LinearCall) -> Gradients:
    weight, A, B = call.adapter.weight, call.adapter.A, call.adapter.B
    return (
        dy.new_empty(*dy.shape[:-1], weight.shape[1]) if needs_x else dy.new_empty(0),
        A.new_empty(0 if x is None else A.shape),
        B.new_empty(0 if x is None else B.shape),
    )


class _Linear(torch.autograd.Function):
    """Saves x, the factors, the seed and references to frozen tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        compute: Pass,
        x: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        algorithm: str,
        call: LinearCall,
    ) -> Any:
        """A and B are the call's: autograd sees only tensors that are arguments of their own."""
        adapter, ctx.dropout, ctx.backend = call
        ctx.partition, ctx.block_ranks = adapter.partition, adapter.block_ranks
        seed = None if ctx.dropout is None else ctx.dropout.seed
        needs_factors = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        ctx.save_for_backward(
            x if needs_factors else None, adapter.weight, A, B, adapter.ranks, adapter.scaling, seed
        )
        ctx.bias_dtype = None if bias is None else bias.dtype
        with torch._C._AutoDispatchBelowAutograd():
            return compute(x, bias, algorithm, call)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, ranks, scaling, seed = ctx.saved_tensors
        _, needs_x, needs_bias, needs_A, needs_B, *_ = ctx.needs_input_grad
        adapter = PackedAdapter(weight, A, B, ctx.partition, ranks, scaling, ctx.block_ranks)
        dropout = None if seed is None else replace(ctx.dropout, seed=seed)
        call = LinearCall(adapter, dropout, ctx.backend)
        dx, dA, dB = call_linear_backward(dy, x, needs_x, call)
        dbias = _as_matrix(dy).sum(0).to(ctx.bias_dtype) if needs_bias else None
        factors = dA if needs_A else None, dB if needs_B else None
        return None, dx if needs_x else None, dbias, *factors, None, None


def _apply_linear(compute: Pass, x: Tensor, bias: Tensor | None, algorithm: str, call: LinearCall) -> Any:
    # `Function.apply` asks whether torch.func wrapped a tensor; what goes past the dispatcher is plain.
    function: Any = super(torch.autograd.Function, _Linear) if compute is _forward else _Linear
    return function.apply(compute, x, bias, call.adapter.A, call.adapter.B, algorithm, call)


def _apply_differentiable(function: Any, compute: Any, first: Tensor, *rest: Any) -> Any:
    """Call what takes a `LinearCall`, the last of `rest`, flat: `torch.func` sees only tensors of their own."""
    second, option, call = rest
    tensors, settings = call.flatten()
    return function.apply(compute, first, second, option, *tensors, *settings)


def _has_tangent(tensor: Tensor | None) -> bool:
    return tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None


def _recorded(compute: Pass, apply: Callable[..., Any], formula: Pass) -> Pass:
    """The same for autograd: recorded by `apply` where a gradient can be asked for, by `formula` in forward mode."""

    def record(first: Tensor, second: Tensor | None, option: Any, call: LinearCall) -> Any:
        if forward_ad._current_level >= 0 and any(map(_has_tangent, (first, second, *call.flatten()[0]))):
            # Computed all the same, the result would have no tangent, which counts as zero.
            return formula(first, second, option, call)
        A, B = call.adapter.A, call.adapter.B
        if torch.is_grad_enabled() and (
            first.requires_grad
            or (second is not None and second.requires_grad)
            or A.requires_grad
            or B.requires_grad
        ):
            return apply(compute, first, second, option, call)
        with torch._C._AutoDispatchBelowAutograd():
            return compute(first, second, option, call)

    return record


def _dispatched(operator: Any) -> Pass:
    """A pass that calls an operator."""

    def dispatch(first: Tensor, second: Tensor | None, option: Any, call: LinearCall) -> Any:
        tensors, settings = call.flatten()
        return operator(first, second, option, *tensors, *settings)

    return dispatch


def _watched(dispatched: Pass, function: Any, compute: Any, formula: Pass) -> Pass:
    """A pass that something watches: `torch.func`, which takes `function`, or what sees the operator."""

    def watch(first: Tensor, second: Tensor | None, option: Any, call: LinearCall) -> Any:
        if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
            return dispatched(first, second, option, call)
        if forward_ad._current_level >= 0:
            return formula(first, second, option, call)
        return _apply_differentiable(function, compute, first, second, option, call)

    return watch


def _kernel(compute: Pass) -> Callable[..., Any]:
    """A pass as an operator's kernel, which takes the operator's arguments."""
    return lambda first, second, option, *flat: compute(first, second, option, LinearCall.unflatten(*flat))


_apply_backward = functools.partial(_apply_differentiable, DifferentiableBackward)
_recorded_forward = _recorded(_forward, _apply_linear, formula)
_recorded_backward = _recorded(_backward, _apply_backward, formula_gradients)
_dispatched_forward, _dispatched_backward = _dispatched(linear), _dispatched(linear_backward)
_watched_forward = _watched(
    _dispatched_forward, DifferentiableLinear, Passes(_dispatched_forward, _dispatched_backward), formula
)
_watched_backward = _watched(
    _dispatched_backward, DifferentiableBackward, _dispatched_backward, formula_gradients
)
for _name, _compute, _fake, _recorded_operator in (
    ("linear", _forward, _forward_fake, _recorded(_dispatched_forward, _apply_linear, formula)),
    (
        "linear_backward",
        _backward,
        _backward_fake,
        _recorded(_dispatched_backward, _apply_backward, formula_gradients),
    ),
):
    _LIBRARY.impl(_name, _kernel(_compute), "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _kernel(_recorded_operator), "Autograd")
    torch.library.register_fake(f"smoa::{_name}", _kernel(_fake), lib=_LIBRARY)


def _as_matrix(x: Tensor) -> Tensor:
    """(..., C) as (T, C); `reshape(-1, C)` cannot infer T from no elements."""
    return x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _with_leading_dimensions(y: Tensor, x: Tensor) -> Tensor:
    """(T, N) as (..., N), with x's leading dimensions."""
    # Autograd must not see a view here: what a Function returns may be written to.
    return y if x.ndim == 2 else _unsafe_view(y, [*x.shape[:-1], y.shape[1]])
