"""The `smoa::linear` operator, its gradient and their fake forms.

The operator is opaque to the compiler, so that no pass takes the order of its additions apart (the adapter's
output survives in half precision only if it enters before the base GEMM's one rounding), and it takes tensors
where a Python number would be baked into a graph: scaling, dropout seed. Which algorithm "auto" means is
decided inside, where the graph does not see the token count.

Registered through `torch.library`'s dispatcher keys with an `autograd.Function` of our own: half the Python
overhead of `custom_op`, which small layers feel. Where nothing would see the dispatcher, it is left out altogether.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backends import load_backend
from .definition.arguments import check_ranks
from .definition.dropout import Dropout
from .definition.packed import PackedAdapter
from .definition.partition import BlockPartition

__all__ = ["call_linear", "linear", "linear_backward"]

Kernel = Callable[..., Any]
"""An operator, or the Python function that does its work."""

_view: Any = torch.ops.aten._unsafe_view.default

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
    return _like(y, x)


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
        dy.new_empty(0) if dx is None else _like(dx, dy),
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
    def forward(ctx: Any, run: Kernel, *args: Any) -> Any:
        x, weight, bias, A, B, ranks, block_ranks, scaling, seed, partition, sizes, *others = args
        p, column_offset, width, _algorithm, backend = others
        needs_factors = ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
        ctx.save_for_backward(x if needs_factors else None, weight, A, B, ranks, scaling, seed, *partition)
        ctx.block_ranks, ctx.sizes, ctx.backend = block_ranks, sizes, backend
        ctx.settings = p, column_offset, width
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _below_autograd(run, args)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, ranks, scaling, seed, *partition = ctx.saved_tensors
        _, needs_x, _, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:6]
        run = _backward_recorded if _unseen(dy, x, weight, A, B) else linear_backward
        dx, dA, dB = run(
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
        factors = dA if needs_A else None, dB if needs_B else None
        gradients = (None, dx if needs_x else None, None, dbias, *factors)
        return gradients + (None,) * (len(ctx.needs_input_grad) - len(gradients))


class _LinearBackward(torch.autograd.Function):
    """Says that there is no second derivative, when one is asked for."""

    @staticmethod
    def forward(ctx: Any, run: Kernel, *args: Any) -> Any:
        return _below_autograd(run, args)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "smoa_linear has no second derivative: smoa_kernels.definition.reference.reference_linear, "
            "plain PyTorch, has"
        )


def _below_autograd(run: Kernel, args: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return run(*args)


def _has_tangent(arg: Any) -> bool:
    return isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None


def _recorded(run: Kernel, function: type[torch.autograd.Function]) -> Kernel:
    """Autograd's form of an operator or its kernel: recorded where a gradient can be asked for, else called through."""

    def dispatch(*args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
            # Called straight through, the result would have none, which counts as zero.
            raise RuntimeError(
                "smoa_linear has no forward-mode derivative: smoa_kernels.definition.reference.reference_linear, "
                "plain PyTorch, has"
            )
        # No other argument of the two operators may.
        if torch.is_grad_enabled() and any(arg is not None and arg.requires_grad for arg in args[:5]):
            return function.apply(run, *args)
        return _below_autograd(run, args)

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
_forward_recorded = _recorded(_forward, _Linear)
_backward_recorded = _recorded(_backward, _LinearBackward)


def call_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, *settings: Any
) -> Tensor:
    """What the operator `linear` gives for these arguments, without the dispatcher where nothing would see it.

    Its two passes, each converting every argument, are 3 % of a small layer's time (measured on CPU, T=128, 384x1536).
    """
    unseen = _unseen(x, weight, bias, A, B)
    y: Tensor = (_forward_recorded if unseen else linear)(x, weight, bias, A, B, *settings)
    return y


def _unseen(*tensors: Tensor | None) -> bool:
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
        # A conjugate's imaginary part is negated by the dispatcher, its zeros are made by it, and so on.
        keys = torch._C._dispatch_keys(one).raw_repr()
        if type(one) not in _PLAIN or one.is_meta or keys not in _plain_keys(one.device.type):
            return False
    return True


_PLAIN = (Tensor, torch.nn.Parameter)


@functools.cache
def _plain_keys(device_type: str) -> frozenset[int]:
    """What the dispatcher looks at in a tensor that is no more than its values, one of inference mode or not."""
    found = set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            found.add(torch._C._dispatch_keys(torch.empty(0, device=device_type)).raw_repr())
    return frozenset(found)


def _tokens(x: Tensor) -> Tensor:
    """(..., C) as (T, C); `reshape(-1, C)` cannot infer T from no elements."""
    return x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _like(y: Tensor, x: Tensor) -> Tensor:
    """(T, N) as (..., N), x's leading dimensions."""
    # No view to autograd: what a Function returns may be written to.
    return y if x.ndim == 2 else _view(y, [*x.shape[:-1], y.shape[1]])
