"""`smoa_linear`: the public function. Validates its arguments, resolves the backend, calls the operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from .backends import ALGORITHM_CHOICES, BACKEND_CHOICES, algorithms_of, eager, load_backend, resolve_backend
from .backends.convolution import factor_gradients
from .checks import check_choice
from .definition.dropout import Dropout, draw_seed
from .definition.packed import PackedAdapter, scaling_tensor
from .definition.partition import BlockPartition
from .definition.precision import autocast_enabled, without_autocast
from .definition.thresholds import ORIGIN, Place, round_weight
from .operators.arguments import (
    check_block_ranks,
    check_dropout,
    check_frozen,
    check_partition,
    check_place,
    check_scaling,
    check_tensors,
)
from .operators.dispatch import is_observed
from .operators.linear import linear


def smoa_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    partition: BlockPartition,
    ranks: Tensor,
    *,
    scaling: float | Tensor,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    row_offset: int = 0,
    column_offset: int = 0,
    global_in_features: int | None = None,
    block_ranks: Sequence[int] | None = None,
    algorithm: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Compute `y = x W0ᵀ + b + dropout(x) ΔWᵀ` with `ΔW = s · mask ∘ (B A) ∘ W0`.

    This is SMoA (arXiv 2605.21147), equations (2) and (3) of docs/definition.md. W0 has N rows (outputs) and C columns
    (inputs), cut into K blocks; block k has rank r_k, and ρ is the largest. The mask is 1 inside the blocks and 0
    elsewhere. s is the scale.

    Differentiable in x, A, B and bias. Saves x, the factors and the seed for backward; W0, the ranks and the
    partition's tensors are referenced. Works under `torch.func`. A batch over the factors, second derivatives and
    forward mode are computed by the reference's formula, slowly.

    Args:
        x: (..., C), floating point, any strides; any leading dimensions, zero tokens included.
        weight: W0 (N, C), frozen, x's dtype (under autocast it is cast as `F.linear`'s would be).
        bias: (N,) or None.
        A: packed factor (ρ, C); W0's dtype or float32.
        B: packed factor (N, ρ), A's dtype. Rows t ≥ r_k of a block are padding: ignored, gradient zero.
        partition: blocks of W0's rows and columns, on x's device.
        ranks: int32 (K,), rank of each block, 0 ≤ r_k ≤ ρ. Checked on the CPU. A check on a GPU would wait for it, so
            there they are clamped to 0 and ρ.
        scaling: s, a number or a 0-d tensor (which a compiled graph does not bake in).
        dropout_p: probability in [0, 1) of dropping an element of the adapter's input.
        dropout_seed: int64 with one element on x's device; drawn from the default generator when None.
        row_offset: if the weight holds a shard of the rows, the global index of its first one. Both offsets place the
            thresholds by which W_eff is rounded to a half type (docs/numerics.md).
        column_offset: if x holds a shard of the columns, the global index of its first one; it also places
            dropout's mask.
        global_in_features: if x holds a shard of the columns, the global number of columns; only checked.
        block_ranks: the numbers in `ranks`, on the host. Without them the eager backend on a GPU reads `ranks` and so
            waits for the GPU, which a CUDA graph cannot hold.
        algorithm: how y is computed.
            "merged": one GEMM with W_eff = W0 + ΔW, rounded to half types by thresholds, so that small updates survive.
            "split": the adapter's output first; the base GEMM accumulates onto it.
            "expanded" (eager and native) and "fused" (triton, one kernel): W0 is read once, for few tokens.
            "auto": the form for few tokens if there are few, otherwise merged. Split while dropout is active, and in
            TF32 by torch's operators, which would round a small update away.
        backend: what computes it: "eager" (torch's operators), "native" (compiled, x86 and ARM CPUs), "triton" (GPUs),
            "reference" (the definition, slow) or "auto" (the fastest that can).

    Returns:
        y (..., N) in x's dtype.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed; nothing was computed.

    Example:
        >>> weight = torch.randn(6, 4)
        >>> partition = BlockPartition.from_weight(weight, num_blocks=2)
        >>> A, B = torch.randn(1, 4), torch.zeros(6, 1)
        >>> ranks = torch.ones(2, dtype=torch.int32)
        >>> y = smoa_linear(torch.randn(3, 4), weight, None, A, B, partition, ranks, scaling=0.5)
        >>> y.shape
        torch.Size([3, 6])
    """
    check_tensors(x, weight, bias, A, B, ranks, autocast=autocast_enabled(x))
    check_scaling(scaling, x)
    check_choice("backend", backend, BACKEND_CHOICES)
    check_choice("algorithm", algorithm, ALGORITHM_CHOICES)
    check_dropout(x, dropout_p, dropout_seed)
    check_place(x, row_offset, column_offset, global_in_features)
    check_partition(partition, weight, ranks)
    check_block_ranks(block_ranks, partition.num_blocks, A.shape[0])
    s, place = scaling_tensor(scaling, x.device), ORIGIN.part(row_offset, column_offset)
    adapter = PackedAdapter(weight, A, B, partition, ranks.contiguous(), s, block_ranks, place)
    mask: Any = {"dropout_p": dropout_p, "dropout_seed": dropout_seed, "column_offset": column_offset}
    return adapted_linear(x, bias, adapter, **mask, algorithm=algorithm, backend=backend)


def adapted_linear(
    x: Tensor,
    bias: Tensor | None,
    adapter: PackedAdapter,
    *,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    column_offset: int = 0,
    algorithm: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Compute :func:`smoa_linear` with an adapter whose blocks and ranks fit, which a layer keeps between calls."""
    autocast = autocast_enabled(x)
    if autocast or not _fits(x, bias, adapter):
        a = adapter
        check_tensors(x, a.weight, bias, a.A, a.B, a.ranks, autocast=autocast)
    if autocast and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    backend = resolve_backend(backend, x.device, x.dtype, adapter.A.shape[0])
    if algorithm != "auto":
        _check_algorithm(algorithm, backend, dropout_p)
    dropout = None
    if dropout_p > 0:
        seed = draw_seed(x.device) if dropout_seed is None else dropout_seed
        dropout = Dropout(seed, dropout_p, column_offset)
    return linear(x, bias, adapter, algorithm, dropout, backend)


def cast_factors(adapter: PackedAdapter, dtype: torch.dtype) -> PackedAdapter:
    """The adapter for activations of `dtype`: PEFT may load factors in another half type, which is cast to `dtype`."""
    A, B = adapter.A, adapter.B
    return adapter if A.dtype in (dtype, torch.float32) else replace(adapter, A=A.to(dtype), B=B.to(dtype))


def for_autocast(adapter: PackedAdapter) -> PackedAdapter:
    """Under autocast, the adapter over W0 in autocast's dtype, into which W_eff is then rounded by thresholds."""
    weight = adapter.weight
    if not autocast_enabled(weight) or weight.dtype == torch.float64:
        return adapter
    dtype = torch.get_autocast_dtype(weight.device.type)
    return replace(cast_factors(adapter, dtype), weight=weight.to(dtype))


def _fits(x: Tensor, bias: Tensor | None, adapter: PackedAdapter) -> bool:
    """Whether nothing that :func:`check_tensors` would check can be wrong; it takes ten times as long."""
    weight, A, B, dtype, device = adapter.weight, adapter.A, adapter.B, x.dtype, x.device
    (rows, cols), of_factors = weight.shape, A.dtype
    return (
        type(x) in (Tensor, Parameter)
        and x.layout == torch.strided
        and x.ndim > 0
        and x.shape[-1] == cols
        and dtype == weight.dtype
        and device == weight.device
        and of_factors in (dtype, torch.float32)
        and of_factors == B.dtype
        and B.shape == (rows, A.shape[0])
        and A.shape[1] == cols
        and not weight.requires_grad
        and (bias is None or (bias.dtype == dtype and bias.shape == (rows,) and bias.device == device))
    )


def _check_algorithm(algorithm: str, backend: str, dropout_p: float) -> None:
    allowed = algorithms_of(backend)
    if algorithm not in allowed:
        raise ValueError(
            f"algorithm must be auto or one of {', '.join(allowed)} on backend {backend!r}, got {algorithm!r}"
        )
    if dropout_p > 0 and algorithm != "split":
        raise ValueError(
            f"algorithm must be 'split' or 'auto' while dropout is active (dropout_p={dropout_p}): the adapter "
            f"sees another x than the base layer. Got {algorithm!r}"
        )


def modulate(adapter: PackedAdapter, backend: str = "eager", rows: Tensor | None = None) -> Tensor:
    """Compute `W_eff = W0 ∘ (1 + s · mask ∘ (B A))`, (N, C) in W0's dtype, differentiable in A and B.

    It is the weight that :func:`linear` multiplies by; the derivative of its rounding counts as 1. A layer of any kind
    can compute with it, but a linear one is faster and leaner by :func:`linear`.

    Args:
        adapter: W0, the factors, their blocks and s.
        backend: what computes it; see :func:`smoa_linear`.
        rows: (T,), the rows of W_eff to compute. The adapter's `weight` (T, C) and B (T, ρ) then hold these rows alone,
            and the result is differentiable in W0 too.

    Raises:
        ValueError: W0 is not frozen, without `rows`; or the backend cannot run here.
    """
    weight, A, B = adapter.weight, adapter.A, adapter.B
    if rows is None:
        check_frozen(weight)
    with without_autocast(weight):
        if rows is not None or is_observed(A, B, weight):
            dtype = torch.promote_types(weight.dtype, torch.float32)
            A, B = adapter.expanded_factors(dtype, rows)
            W_eff = torch.addcmul(weight.to(dtype), weight.to(dtype), B @ A)
            if dtype == weight.dtype:  # forward mode goes through plain operators alone
                return W_eff
            return _round(W_eff, weight.dtype, adapter.place.first, rows)
        backend = resolve_backend(backend, weight.device, weight.dtype, A.shape[0])
        return _modulate(A, B, adapter, backend)


def modulated_convolution(x: Tensor, conv: Any, adapter: PackedAdapter, backend: str) -> Tensor:
    """Compute one of torch's convolutions with W_eff, differentiable in x, A, B and the bias.

    Args:
        x: as the module takes it.
        conv: the module.
        adapter: of its weight as a matrix.
        backend: what computes W_eff; see :func:`smoa_linear`.

    Raises:
        ValueError: as :func:`modulate`.
    """
    if (given := for_autocast(adapter)) is not adapter:
        adapter, x = given, x if x.dtype == torch.float64 else x.to(given.weight.dtype)
    A, B, weight = adapter.A, adapter.B, adapter.weight
    if (
        adapter.partition.num_blocks == 1
        or conv.groups > 1
        or conv.padding_mode != "zeros"
        or isinstance(conv.padding, str)
        or x.device.type != "cpu"
        or (x.ndim, x.dtype) != (2 + len(conv.kernel_size), weight.dtype)
        or is_observed(x, A, B, weight)
    ):
        W_eff = modulate(adapter, backend).unflatten(1, (-1, *conv.kernel_size))
        y: Tensor = conv._conv_forward(x, W_eff, conv.bias)
        return y
    check_frozen(weight)
    backend = resolve_backend(backend, x.device, x.dtype, A.shape[0])
    return _convolve(x, A, B, conv.bias, adapter, conv, backend)


def embedded_rows(x: Tensor, embedding: Any, rows: Tensor, adapter: PackedAdapter) -> Tensor:
    """Modulate rows of W0 that an `nn.Embedding` looked up; differentiable in the factors, and in the rows.

    Args:
        x: indices, any shape.
        embedding: the module; B's gradient is as its options say.
        rows: (..., C), the rows of W0 at x.
        adapter: its `weight` is not used.
    """
    at, sparse = x.flatten(), embedding.sparse and adapter.B.is_leaf
    by_freq = embedding.scale_grad_by_freq
    B = F.embedding(at, adapter.B, embedding.padding_idx, scale_grad_by_freq=by_freq, sparse=sparse)
    given = cast_factors(replace(adapter, weight=rows.reshape(-1, rows.shape[-1]), B=B), rows.dtype)
    return modulate(given, rows=at).view_as(rows)


def dense_update(adapter: PackedAdapter) -> Tensor:
    """Compute ΔW (N, C) in at least float32, differentiable in A and B, for a layer whose dropout W0 does not see."""
    with without_autocast(adapter.weight):
        A, B = adapter.expanded_factors(torch.promote_types(adapter.weight.dtype, torch.float32))
        return (B @ A) * adapter.weight


class _Round(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(W_eff: Tensor, dtype: torch.dtype, place: int, rows: Tensor | None) -> Tensor:
        return round_weight(W_eff, dtype, Place(place), rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, dW: Tensor) -> tuple[Tensor | None, ...]:
        return dW.to(ctx.dtype), None, None, None


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


class _Convolve(torch.autograd.Function):
    """A convolution with W_eff, whose own gradient is computed in the blocks alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, bias: Any, adapter: PackedAdapter, conv: Any, backend: str
    ) -> Any:
        ctx.adapter, ctx.conv, ctx.backend = replace(adapter, scaling=adapter.scaling.clone()), conv, backend
        ctx.save_for_backward(x, A, B, adapter.weight)
        W_eff = load_backend(backend).modulated_weight(adapter)
        return conv._conv_forward(x, W_eff.unflatten(1, (-1, *conv.kernel_size)), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (x, A, B, weight), conv, dx = ctx.saved_tensors, ctx.conv, None
        adapter = replace(ctx.adapter, weight=weight, A=A, B=B)
        if torch.is_grad_enabled() or is_observed(dy):  # a derivative of the gradients may be asked for

            def plain(x: Tensor, A: Tensor, B: Tensor) -> Any:
                W_eff = modulate(replace(adapter, A=A, B=B)).unflatten(1, (-1, *conv.kernel_size))
                return conv._conv_forward(x, W_eff, None)

            dx, *factors = torch.func.vjp(plain, x, A, B)[1](dy)
        else:
            with without_autocast(dy):
                factors = factor_gradients(dy, x, adapter, conv)
                if ctx.needs_input_grad[0]:
                    W_eff = load_backend(ctx.backend).modulated_weight(adapter)
                    W_eff = W_eff.unflatten(1, (-1, *conv.kernel_size))
                    given = dy, x, W_eff, None, conv.stride, conv.padding, conv.dilation, False, [0], 1
                    dx = torch.ops.aten.convolution_backward(*given, [True, False, False])[0]
        dbias = dy.sum((0, *range(2, dy.ndim))) if ctx.needs_input_grad[3] else None
        return dx, *factors, dbias, None, None, None


_round: Callable[..., Tensor] = _Round.apply
_modulate: Callable[..., Tensor] = _Modulate.apply
_convolve: Callable[..., Tensor] = _Convolve.apply
