"""What `torch.func` asks of `smoa::linear` beside a gradient: batches, further derivatives, forward mode.

A gradient alone is the operator `linear_backward`. Under a transform of `torch.func` it is one that can be batched: a
batch of activations joins the tokens of one call. All else (a batch over the factors, the derivative of a gradient, a
forward-mode derivative) takes the reference's formula in plain operators, which torch differentiates and batches by
itself: slow and right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .definition import reference
from .definition.linear_call import TENSORS, LinearCall

__all__ = ["DifferentiableBackward", "DifferentiableLinear", "Passes", "formula", "formula_gradients"]

Gradients = tuple[Tensor, Tensor, Tensor]
"""(dX, dA, dB), empty where not needed."""
Forward = Callable[[Tensor, "Tensor | None", str, LinearCall], Tensor]
Backward = Callable[[Tensor, "Tensor | None", bool, LinearCall], Gradients]


class Passes(NamedTuple):
    """How the operators are called.

    Attributes:
        forward: y from (x, bias, algorithm, call).
        backward: gradients from (dy, x, needs_x, call).
    """

    forward: Forward
    backward: Backward


def formula(x: Tensor, bias: Tensor | None, algorithm: str, call: LinearCall) -> Tensor:
    """Compute what `linear` does, (..., C) -> (..., N), by the reference, differentiable in x, bias, A and B.

    Args:
        x: (..., C).
        bias: (N,) or None.
        algorithm: any; there is one.
        call: the rest.

    Raises:
        RuntimeError: the kernels' dropout is on, whose mask is not the reference's.
    """
    if call.dropout is not None and call.backend == "triton":
        raise RuntimeError(
            "under dropout backend 'triton' has a gradient and nothing further (its mask is drawn inside the kernels): "
            "no second derivative, forward mode or batch; use backend='eager' or no dropout"
        )
    adapter, matrix = call.adapter, x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if adapter.block_ranks is not None:  # a batch of models has a batch of ranks, which are the same numbers
        ranks = torch.tensor(adapter.block_ranks, dtype=adapter.ranks.dtype)
        adapter = replace(adapter, ranks=ranks)
    adapter = replace(adapter, weight=adapter.weight.to(x.dtype))
    bias = None if bias is None else bias.to(x.dtype)
    y = reference.forward(matrix, bias, adapter, "auto", call.dropout)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def formula_gradients(dy: Tensor, x: Tensor | None, needs_x: bool, call: LinearCall) -> Gradients:
    """Compute what `linear_backward` does as the derivative of :func:`formula`, differentiable in dy, x, A and B.

    Args:
        dy: (..., N).
        x: (..., C), or None where neither dA nor dB is needed.
        needs_x: whether dX is needed.
        call: that of the forward.
    """
    adapter = call.adapter
    at = (
        dy.new_zeros(*dy.shape[:-1], adapter.weight.shape[1]) if x is None else x
    )  # dX is the same for every x

    def forward(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return formula(x, None, "auto", call._replace(adapter=replace(adapter, A=A, B=B)))

    dx, dA, dB = torch.func.vjp(forward, at, adapter.A, adapter.B)[1](dy)
    factors = (dA.new_empty(0), dB.new_empty(0)) if x is None else (dA, dB)
    return dx if needs_x else dy.new_empty(0), *factors


class DifferentiableLinear(torch.autograd.Function):
    """`linear` under transforms of `torch.func`, from (passes, x, bias, algorithm, *the call, flat)."""

    @staticmethod
    def forward(passes: Passes, x: Tensor, bias: Tensor | None, algorithm: str, *flat: Any) -> Tensor:
        """Call the operator, below all transforms."""
        return passes.forward(x, bias, algorithm, LinearCall.unflatten(*flat))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save x and the call's tensors."""
        ctx.passes, x, bias, _, *flat = inputs
        ctx.save_for_backward(x, *flat[:TENSORS])
        ctx.settings = flat[TENSORS:]
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in x, bias, A and B."""
        x, *tensors = ctx.saved_tensors
        _, needs_x, needs_bias, _, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        flat = *tensors, *ctx.settings
        x = x if needs_A or needs_B else None
        dx, dA, dB = _apply(DifferentiableBackward, ctx.passes.backward, dy, x, needs_x, *flat)
        dbias = dy.sum(tuple(range(dy.ndim - 1))).to(ctx.bias_dtype) if needs_bias else None
        factors = dA if needs_A else None, dB if needs_B else None
        return None, dx if needs_x else None, dbias, None, None, *factors, *[None] * (len(flat) - 3)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        """A batch of x alone is a further leading dimension."""
        passes, x, bias, algorithm, *flat = inputs
        _, of_x, of_bias, _, *of_call = in_dims
        _check_seed(of_call)
        if of_x is not None and _only_activations(of_call, flat) and of_bias is None:
            return _apply(DifferentiableLinear, passes, x.movedim(of_x, 0), bias, algorithm, *flat), 0

        def one(x: Tensor, bias: Tensor | None, *tensors: Any) -> Tensor:
            return formula(x, bias, algorithm, LinearCall.unflatten(*tensors, *flat[TENSORS:]))

        return _batched(one, (of_x, of_bias, *of_call[:TENSORS]))(x, bias, *flat[:TENSORS]), 0


class DifferentiableBackward(torch.autograd.Function):
    """`linear_backward` under transforms, or where its own derivative may be asked for.

    From (how it is called, dy, x, needs_x, *the call, flat).
    """

    @staticmethod
    def forward(compute: Backward, dy: Tensor, x: Tensor | None, needs_x: bool, *flat: Any) -> Gradients:
        """Call the operator, below all transforms."""
        return compute(dy, x, needs_x, LinearCall.unflatten(*flat))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
        """Save what the gradients depend on."""
        _, dy, x, ctx.needs_x, *flat = inputs
        ctx.save_for_backward(dy, x, *flat[:TENSORS])
        ctx.settings = flat[TENSORS:]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """Derivatives in dy, x, A and B, by the formula."""
        dy, x, *tensors = ctx.saved_tensors
        call = LinearCall.unflatten(*tensors, *ctx.settings)

        def gradients(dy: Tensor, A: Tensor, B: Tensor, x: Tensor | None = None) -> Gradients:
            of = call._replace(adapter=replace(call.adapter, A=A, B=B))
            return formula_gradients(dy, x, ctx.needs_x, of)

        primals = dy, call.adapter.A, call.adapter.B, *(() if x is None else (x,))
        ddy, dA, dB, *dx = torch.func.vjp(gradients, *primals)[1](cotangents)
        rest = [None] * (len(tensors) + len(ctx.settings) - 3)
        return None, ddy, dx[0] if dx else None, None, None, dA, dB, *rest

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Gradients, tuple[Any, ...]]:
        """A batch of dY is a further leading dimension for dX; each sample's dA and dB come from the formula."""
        compute, dy, x, needs_x, *flat = inputs
        _, of_dy, of_x, _, *of_call = in_dims
        _check_seed(of_call)
        joined = of_dy is not None and needs_x and _only_activations(of_call, flat)
        needs_x = needs_x and not joined

        def one(dy: Tensor, x: Tensor | None, *tensors: Any) -> Gradients:
            return formula_gradients(dy, x, needs_x, LinearCall.unflatten(*tensors, *flat[TENSORS:]))

        found: Gradients = dy.new_empty(0), dy.new_empty(0), dy.new_empty(0)
        dims: tuple[Any, ...] = None, None, None
        if needs_x or x is not None:
            found = _batched(one, (of_dy, of_x, *of_call[:TENSORS]))(dy, x, *flat[:TENSORS])
            dims = 0, 0, 0
        if joined:
            dx, *_ = _apply(DifferentiableBackward, compute, dy.movedim(of_dy, 0), None, True, *flat)
            found, dims = (dx, *found[1:]), (0, *dims[1:])
        return found, dims


def _only_activations(of_call: Sequence[int | None], flat: Sequence[Any]) -> bool:
    """Whether a call is one for the whole batch, and has no mask: joined tokens would have different ones."""
    return all(dim is None for dim in of_call[:TENSORS]) and LinearCall.unflatten(*flat).dropout is None


def _check_seed(of_call: Sequence[int | None]) -> None:
    if of_call[5] is not None:
        raise ValueError(
            "dropout under vmap takes randomness='same', one mask for the whole batch: got a seed for each sample"
        )


def _batched(function: Callable[..., Any], in_dims: tuple[int | None, ...]) -> Callable[..., Any]:
    # The seed is given, so a mask is the same each time that it is drawn.
    batched: Callable[..., Any] = torch.vmap(function, in_dims, randomness="same")
    return batched


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    return function.apply(*args)
