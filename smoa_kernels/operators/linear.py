"""`linear`, the operators `smoa::linear` and `smoa::linear_backward` behind it, and all their derivatives.

The operators are opaque to compilers, for two reasons. A compiler must not reorder their additions: in half precision
the adapter's output survives only if it is added before the base GEMM rounds. And a graph must not bake in values that
change between calls: scaling and dropout seed are passed as tensors, and "auto" is decided inside, so that the graph
does not depend on the token count.

A gradient is the operator `linear_backward`. A batch of activations (`torch.func.vmap`) joins the tokens of one call.
A batch over the factors, the derivative of a gradient and a forward-mode derivative take the reference's formula in
plain operators, which torch differentiates and batches by itself, slowly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import load_backend
from ..definition.dropout import Dropout
from ..definition.packed import PackedAdapter, scaling_tensor
from ..definition.partition import BlockPartition
from ..definition.precision import without_autocast
from ..definition.thresholds import Place
from .arguments import check_ranks
from .dispatch import is_observed, register

_CALL = (
    "Tensor weight, Tensor A, Tensor B, Tensor ranks, Tensor scaling, Tensor? dropout_seed, Tensor plan, "
    "int[]? block_ranks, int place, float dropout_p, int column_offset, str backend"
)
_TENSORS = _CALL.count("Tensor")

Gradients = tuple[Tensor, Tensor, Tensor]
"""(dX, dA, dB), empty where not needed."""


class LinearCall(NamedTuple):
    """The arguments that forward and backward of a call share.

    Attributes:
        adapter: W0, the factors, their blocks and ranks, and s.
        dropout: the active dropout, or None.
        backend: the name of a resolved backend.
    """

    adapter: PackedAdapter
    dropout: Dropout | None
    backend: str

    def flatten(self) -> tuple[Any, ...]:
        """The arguments of the operators, tensors first: they take only tensors and plain types."""
        adapter, drop = self.adapter, self.dropout
        seed, *mask = (None, 0.0, 0) if drop is None else (drop.seed, drop.p, drop.column_offset)
        tensors = adapter.weight, adapter.A, adapter.B, adapter.ranks, adapter.scaling, seed
        ranks = None if adapter.block_ranks is None else list(adapter.block_ranks)
        return *tensors, adapter.partition.plan, ranks, adapter.place.first, *mask, self.backend

    @staticmethod
    def unflatten(*flat: Any) -> LinearCall:
        """Inverse of :meth:`flatten`."""
        weight, A, B, ranks, scaling, seed, plan, block_ranks, place, p, column_offset, backend = flat
        partition = BlockPartition.from_plan(plan)
        adapter = PackedAdapter(
            weight, A, B, partition, ranks.contiguous(), scaling, block_ranks, Place(place)
        )
        dropout = None if seed is None else Dropout(seed, p, column_offset)
        return LinearCall(adapter, dropout, backend)


def linear(
    x: Tensor,
    bias: Tensor | None,
    adapter: PackedAdapter,
    algorithm: str,
    dropout: Dropout | None,
    backend: str,
) -> Tensor:
    """Compute `y = x W0ᵀ + b + dropout(x) ΔWᵀ`, differentiable in x, bias, A and B.

    torch's dispatcher takes a small layer as long as its products do, so the operator is called only if something has
    to see it. If s is changed in place between a forward and its backward, the backward still uses the forward's s.

    Args:
        x: (..., C).
        bias: (N,) or None.
        adapter: W0, the factors, their blocks and s. If it is kept, so is what the backend made of it.
        algorithm: one of `ALGORITHM_CHOICES`.
        dropout: the active dropout, or None.
        backend: the name of a resolved backend.

    Returns:
        (..., N) in x's dtype.
    """
    if is_observed(x, adapter.weight, adapter.A, adapter.B):
        adapter = replace(adapter, scaling=adapter.scaling.clone())
        y: Tensor = call_linear(x, bias, algorithm, *LinearCall(adapter, dropout, backend).flatten())
        return y
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, bias, adapter.A, adapter.B):
        return _direct(x, bias, adapter.A, adapter.B, algorithm, LinearCall(adapter, dropout, backend))
    return _compute(x, bias, algorithm, LinearCall(adapter, dropout, backend))


def linear_gradients(
    dy: Tensor, x: Tensor | None, call: LinearCall, *, needs_x: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (dX, dA, dB) of :func:`linear`: dX where `needs_x`, dA and dB where x is given; others are not defined.

    They are differentiable where gradients are enabled.
    """
    if torch.is_grad_enabled() or is_observed(dy, *(() if x is None else (x,))):
        gradients: Gradients = call_linear_backward(dy, x, needs_x, *call.flatten())
        return gradients
    return _compute_gradients(dy, x, call, needs_x=needs_x)


def _compute(x: Tensor, bias: Tensor | None, algorithm: str, call: LinearCall) -> Tensor:
    adapter, dropout, backend = call
    if adapter.layout is None:  # no backend has taken it yet
        check_ranks(adapter.ranks, adapter.block_ranks, adapter.A.shape[0])
    if bias is not None:
        bias = (bias if bias.dtype == x.dtype else bias.to(x.dtype)).contiguous()
    # Under autocast each pass casts W0, so that no copy is saved for backward.
    if adapter.weight.dtype != x.dtype:
        adapter = replace(adapter, weight=adapter.weight.to(x.dtype))
    with without_autocast(x):  # it would round B A to half precision
        y = load_backend(backend).forward(_as_matrix(x), bias, adapter, algorithm, dropout)
    return _with_leading_dimensions(y, x)


def _compute_gradients(
    dy: Tensor, x: Tensor | None, call: LinearCall, *, needs_x: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    adapter, dropout, backend = call
    rows = None if x is None else _as_matrix(x)
    if adapter.weight.dtype != dy.dtype:
        adapter = replace(adapter, weight=adapter.weight.to(dy.dtype))
    with without_autocast(dy):
        dx, dA, dB = load_backend(backend).backward(_as_matrix(dy), rows, adapter, dropout, needs_x=needs_x)
    return None if dx is None else _with_leading_dimensions(dx, dy), dA, dB


def _version(tensor: Tensor) -> int | None:
    """A number that grows when a tensor is changed in place; None where torch does not count."""
    return None if tensor.is_inference() else tensor._version


# `Function.apply` looks for transforms, and for tensors left over from one, which `is_observed` has done: of a forward
# of 50 µs that took 2.
class _Direct(torch.autograd.function._SingleLevelFunction):
    """:func:`linear` where nothing has to see the operator."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        algorithm: str,
        call: LinearCall,
    ) -> Tensor:
        """Save x if the factors' gradients need it, the factors, the seed, and references to frozen tensors."""
        _, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        adapter, dropout, _ = call
        seed = None if dropout is None else dropout.seed
        ctx.save_for_backward(x if needs_A or needs_B else None, adapter.weight, A, B, adapter.ranks, seed)
        s = adapter.scaling
        ctx.call, ctx.scaling, ctx.version = call, s.item() if s.is_cpu else s.clone(), _version(s)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _compute(x, bias, algorithm, call)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in x, bias, A and B."""
        x, weight, A, B, ranks, seed = ctx.saved_tensors
        needs_x, needs_bias, needs_A, needs_B, *_ = ctx.needs_input_grad
        adapter, dropout, backend = ctx.call
        same = weight is adapter.weight and A is adapter.A and B is adapter.B and ranks is adapter.ranks
        if not same or ctx.version is None or ctx.version != _version(adapter.scaling):
            s = scaling_tensor(ctx.scaling, weight.device)
            adapter = replace(adapter, weight=weight, A=A, B=B, ranks=ranks, scaling=s)
        if dropout is not None:
            dropout = replace(dropout, seed=seed)
        dx, dA, dB = linear_gradients(dy, x, LinearCall(adapter, dropout, backend), needs_x=needs_x)
        dbias = _as_matrix(dy).sum(0).to(ctx.bias_dtype) if needs_bias else None
        return dx if needs_x else None, dbias, dA if needs_A else None, dB if needs_B else None, None, None


_direct: Callable[..., Tensor] = _Direct.apply  # type: ignore[attr-defined]  # torch does not declare it


# The operators' kernels


def _forward(x: Tensor, bias: Tensor | None, algorithm: str, *flat: Any) -> Tensor:
    return _compute(x, bias, algorithm, LinearCall.unflatten(*flat))


def _backward(dy: Tensor, x: Tensor | None, needs_x: bool, *flat: Any) -> Gradients:
    call = LinearCall.unflatten(*flat)
    gradients = _compute_gradients(dy, x, call, needs_x=needs_x)
    return or_empty(gradients, (dy, call.adapter.A, call.adapter.B))


def or_empty(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> Gradients:
    """Gradients as an operator returns them: an empty tensor for each gradient that was not needed."""
    pairs = zip(gradients, like, strict=True)
    dx, dA, dB = (tensor.new_empty(0) if gradient is None else gradient for gradient, tensor in pairs)
    return dx, dA, dB


def _forward_fake(x: Tensor, bias: Tensor | None, algorithm: str, *flat: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], flat[0].shape[0])


def backward_fake(dy: Tensor, x: Tensor | None, needs_x: bool, *flat: Any) -> Gradients:
    """Gradients without values; `flat` begins with W0, A and B."""
    weight, A, B, *_ = flat
    return (
        dy.new_empty(*dy.shape[:-1], weight.shape[-1]) if needs_x else dy.new_empty(0),
        A.new_empty(0 if x is None else A.shape),
        B.new_empty(0 if x is None else B.shape),
    )


def _as_matrix(x: Tensor) -> Tensor:
    """(..., C) as (T, C); `reshape(-1, C)` cannot infer T from no elements."""
    return x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _with_leading_dimensions(y: Tensor, x: Tensor) -> Tensor:
    """(T, N) as (..., N), with x's leading dimensions."""
    # Autograd must not see a view here, since callers may write to an operator's result.
    return y if x.ndim == 2 else torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[1]])


# The same by the reference, which torch differentiates in x, bias, dY, A and B, and batches


def formula(x: Tensor, bias: Tensor | None, algorithm: str, *flat: Any) -> Tensor:
    """Compute `linear` by the reference."""
    return _forward(x, bias, algorithm, *_for_reference(*flat))


def formula_gradients(dy: Tensor, x: Tensor | None, needs_x: bool, *flat: Any) -> Gradients:
    """Compute `linear_backward` by the reference."""
    return _backward(dy, x, needs_x, *_for_reference(*flat))


def _for_reference(*flat: Any) -> tuple[Any, ...]:
    """The same call for the reference."""
    adapter, dropout, _ = LinearCall.unflatten(*flat)
    if adapter.block_ranks is not None:  # a batch of models has a batch of ranks, all equal
        adapter = replace(adapter, ranks=torch.tensor(adapter.block_ranks, dtype=adapter.ranks.dtype))
    return LinearCall(adapter, dropout, "reference").flatten()


# Derivatives


class _Linear(torch.autograd.Function):
    """`linear` with its derivatives; its arguments are the operator's."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save x if the factors' gradients need it, the factors, the seed, and references to frozen tensors."""
        x, bias, _, *flat = inputs
        _, _, _, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_A or needs_B else None, *flat[:_TENSORS])
        ctx.settings = flat[_TENSORS:]
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in x, bias, A and B."""
        x, *tensors = ctx.saved_tensors
        needs_x, needs_bias, _, _, needs_A, needs_B, *others = ctx.needs_input_grad
        dx, dA, dB = call_linear_backward(dy, x, needs_x, *tensors, *ctx.settings)
        dbias = _as_matrix(dy).sum(0).to(ctx.bias_dtype) if needs_bias else None
        factors = dA if needs_A else None, dB if needs_B else None
        return dx if needs_x else None, dbias, None, None, *factors, *[None] * len(others)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        """A batch of x alone is one more leading dimension."""
        x, bias, algorithm, *flat = inputs
        of_x, of_bias, _, *of_call = in_dims
        _check_seed(of_call)
        if of_x is not None and of_bias is None and _is_one_call(of_call, flat):
            return call_linear(x.movedim(of_x, 0), bias, algorithm, *flat), 0
        return _vmap(formula, in_dims)(*inputs), 0


class _LinearBackward(torch.autograd.Function):
    """`linear_backward` with its own derivative; its arguments are the operator's."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
        """Save the tensors and settings that the gradients depend on."""
        dy, x, ctx.needs_x, *flat = inputs
        ctx.save_for_backward(dy, x, *flat[:_TENSORS])
        ctx.settings = flat[_TENSORS:]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """Derivatives in dy, x, A and B, by the formula."""
        dy, x, weight, A, B, *tensors = ctx.saved_tensors
        rest = *tensors, *ctx.settings

        def gradients(dy: Tensor, A: Tensor, B: Tensor, x: Tensor | None = None) -> Gradients:
            return formula_gradients(dy, x, ctx.needs_x, weight, A, B, *rest)

        primals = dy, A, B, *(() if x is None else (x,))
        ddy, dA, dB, *dx = torch.func.vjp(gradients, *primals)[1](cotangents)
        return ddy, dx[0] if dx else None, None, None, dA, dB, *[None] * len(rest)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Gradients, tuple[Any, ...]]:
        """A batch of dY is one more leading dimension for dX; each sample's dA and dB come from the formula."""
        dy, x, needs_x, *flat = inputs
        of_dy, _, _, *of_call = in_dims
        _check_seed(of_call)
        joined = of_dy is not None and needs_x and _is_one_call(of_call, flat)
        needs_x = needs_x and not joined
        gradients: Gradients = dy.new_empty(0), dy.new_empty(0), dy.new_empty(0)
        dims: tuple[Any, ...] = None, None, None
        if needs_x or x is not None:
            gradients = _vmap(formula_gradients, in_dims)(dy, x, needs_x, *flat)
            dims = 0, 0, 0
        if joined:
            dx, *_ = call_linear_backward(dy.movedim(of_dy, 0), None, True, *flat)
            gradients, dims = (dx, *gradients[1:]), (0, *dims[1:])
        return gradients, dims


def _is_one_call(of_call: Sequence[int | None], flat: Sequence[Any]) -> bool:
    """Whether all samples share the call and it has no dropout: joined tokens would get other masks."""
    return all(dim is None for dim in of_call[:_TENSORS]) and LinearCall.unflatten(*flat).dropout is None


def _check_seed(of_call: Sequence[int | None]) -> None:
    if of_call[5] is not None:
        raise ValueError(
            "dropout under vmap takes randomness='same', one mask for the whole batch: got a seed for each sample"
        )


# The seed is given, so every draw of a mask is the same.
_vmap: Any = partial(torch.vmap, randomness="same")


# Registration

linear_operator, call_linear = register(
    f"linear(Tensor x, Tensor? bias, str algorithm, {_CALL}) -> Tensor",
    kernel=_forward,
    fake=_forward_fake,
    function=_Linear,
    formula=formula,
)
"""`y = x W0ᵀ + b + dropout(x) ΔWᵀ` for x (..., C), a bias or None, an algorithm, and a flat :class:`LinearCall`."""

linear_backward_operator, call_linear_backward = register(
    f"linear_backward(Tensor dy, Tensor? x, bool needs_x, {_CALL}) -> (Tensor dx, Tensor dA, Tensor dB)",
    kernel=_backward,
    fake=backward_fake,
    function=_LinearBackward,
    formula=formula_gradients,
)
"""Its (dX, dA, dB), empty where not needed, for dy (..., N), x where dA or dB is needed, and whether dX is."""
