"""The `smoa::linear` operator, its gradient and their fake forms.

The operator is opaque to the compiler, so that no pass takes the order of its additions apart (the adapter's
output survives in half precision only if it enters before the base GEMM's one rounding), and it takes tensors
where a Python number would be baked into a graph: scaling, dropout seed. Which algorithm "auto" means is
decided inside, where the graph does not see the token count.

Registered through `torch.library`'s dispatcher keys with an `autograd.Function` of our own: half the Python
overhead of `custom_op`, which small layers feel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .arguments import check_ranks
from .backends import load_backend
from .dropout import Dropout
from .packed import PackedAdapter
from .partition import BlockPartition

__all__ = ["linear"]

_LIBRARY = torch.library.Library("smoa", "DEF")
_ADAPTER = (
    "Tensor weight, {bias}Tensor A, Tensor B, Tensor ranks, int[]? block_ranks, Tensor scaling, "
    "Tensor? dropout_seed"
)
_SETTINGS = "Tensor[] partition, int[] sizes, float dropout_p, int column_offset, int global_in_features"
_LIBRARY.define(
    f"linear(Tensor x, {_ADAPTER.format(bias='Tensor? bias, ')}, {_SETTINGS}, str algorithm, str backend) -> Tensor"
)
_LIBRARY.define(
    f"linear_backward(Tensor dy, Tensor? x, {_ADAPTER.format(bias='')}, {_SETTINGS}, bool needs_x, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    ranks: Tensor,
    block_ranks: Sequence[int] | None,
    scaling: Tensor,
    seed: Tensor | None,
    partition: Sequence[Tensor],
    sizes: Sequence[int],
    p: float,
    column_offset: int,
    width: int,
    algorithm: str,
    backend: str,
) -> Tensor:
    check_ranks(ranks, block_ranks, A.shape[0])
    blocks = BlockPartition.from_tensors(partition, sizes)
    # Under autocast W0 is cast here, per call, so that no copy of it is saved for backward.
    adapter = PackedAdapter(weight.to(x.dtype), A, B, blocks, ranks, scaling, block_ranks)
    dropout = None if seed is None else Dropout(seed, p, column_offset, width)
    bias = None if bias is None else bias.to(x.dtype)
    y: Tensor = load_backend(backend).forward(_tokens(x), bias, adapter, algorithm, dropout)
    return y.view(*x.shape[:-1], weight.shape[0])


def _forward_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    ranks: Tensor,
    block_ranks: Sequence[int] | None,
    scaling: Tensor,
    seed: Tensor | None,
    partition: Sequence[Tensor],
    sizes: Sequence[int],
    p: float,
    column_offset: int,
    width: int,
    needs_x: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dA, dB), empty where not needed: dX unless `needs_x`, dA and dB where x was not kept."""
    blocks = BlockPartition.from_tensors(partition, sizes)
    adapter = PackedAdapter(weight.to(dy.dtype), A, B, blocks, ranks, scaling, block_ranks)
    dropout = None if seed is None else Dropout(seed, p, column_offset, width)
    dx, dA, dB = load_backend(backend).backward(
        _tokens(dy), None if x is None else _tokens(x), adapter, dropout, needs_x=needs_x
    )
    return (
        dy.new_empty(0) if dx is None else dx.view(*dy.shape[:-1], weight.shape[1]),
        A.new_empty(0) if dA is None else dA,
        B.new_empty(0) if dB is None else dB,
    )


def _backward_fake(
    dy: Tensor, x: Tensor | None, weight: Tensor, A: Tensor, B: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, needs_x, _backend = rest
    return (
        dy.new_empty(*dy.shape[:-1], weight.shape[1]) if needs_x else dy.new_empty(0),
        A.new_empty(0 if x is None else A.shape),
        B.new_empty(0 if x is None else B.shape),
    )


class _Linear(torch.autograd.Function):
    """Saves x, the factors, the seed and references to frozen tensors."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        x, weight, bias, A, B, ranks, block_ranks, scaling, seed, partition, sizes, *others = args
        p, column_offset, width, _algorithm, backend = others
        needs_factors = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        ctx.save_for_backward(x if needs_factors else None, weight, A, B, ranks, scaling, seed, *partition)
        ctx.block_ranks, ctx.sizes, ctx.backend = block_ranks, sizes, backend
        ctx.settings = p, column_offset, width
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _below_autograd(linear, args)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, ranks, scaling, seed, *partition = ctx.saved_tensors
        needs_x, _, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:5]
        dx, dA, dB = linear_backward(
            dy,
            x,
            weight,
            A,
            B,
            ranks,
            ctx.block_ranks,
            scaling,
            seed,
            partition,
            ctx.sizes,
            *ctx.settings,
            needs_x,
            ctx.backend,
        )
        dbias = _tokens(dy).sum(0).to(ctx.bias_dtype) if needs_bias else None
        gradients = (dx if needs_x else None, None, dbias, dA if needs_A else None, dB if needs_B else None)
        return gradients + (None,) * (len(ctx.needs_input_grad) - len(gradients))


class _LinearBackward(torch.autograd.Function):
    """Says that there is no second derivative, when one is asked for."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        return _below_autograd(linear_backward, args)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "smoa_linear has no second derivative: smoa_kernels.reference.reference_linear, plain PyTorch, has"
        )


def _below_autograd(operator: Any, args: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def _has_tangent(arg: Any) -> bool:
    return isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None


def _recorded(operator: Any, function: type[torch.autograd.Function]) -> Any:
    """The operator's autograd form: recorded where a gradient can be asked for, else called straight through."""

    def dispatch(*args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
            # Called straight through, the result would have none, which counts as zero.
            raise RuntimeError(
                "smoa_linear has no forward-mode derivative: smoa_kernels.reference.reference_linear, "
                "plain PyTorch, has"
            )
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return function.apply(*args)
        return _below_autograd(operator, args)

    return dispatch


linear: Any = torch.ops.smoa.linear.default
linear_backward: Any = torch.ops.smoa.linear_backward.default
for _name, _kernel, _fake, _operator, _function in (
    ("linear", _forward, _forward_fake, linear, _Linear),
    ("linear_backward", _backward, _backward_fake, linear_backward, _LinearBackward),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _recorded(_operator, _function), "Autograd")
    torch.library.register_fake(f"smoa::{_name}", _fake, lib=_LIBRARY)


def _tokens(x: Tensor) -> Tensor:
    """(..., C) as (T, C); `reshape(-1, C)` cannot infer T from no elements."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])
