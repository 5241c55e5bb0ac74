"""The operators `smoa::experts_linear` and its gradient: `smoa::linear` for pairs sorted by expert.

They are opaque for the same reasons. The numbers of pairs are passed as a tensor, so that no graph bakes them in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import load_experts_backend
from ..definition.experts import ExpertBlocks, ExpertsAdapter
from ..definition.precision import without_autocast
from .dispatch import register
from .linear import Gradients, backward_fake, or_empty

_CALL = (
    "Tensor weight, Tensor A, Tensor B, Tensor ends, Tensor ranks, Tensor scaling, Tensor row_offsets, "
    "Tensor col_offsets, Tensor? row_index, Tensor? col_index, int granule, str backend"
)
_TENSORS = _CALL.count("Tensor")


def flatten(ends: Tensor, adapter: ExpertsAdapter, backend: str) -> tuple[Any, ...]:
    """The arguments that forward and backward of a call share, tensors first, as the operators take them."""
    blocks = adapter.blocks
    tensors = adapter.weight, adapter.A, adapter.B, ends, adapter.ranks, adapter.scaling
    places = blocks.row_offsets, blocks.col_offsets, blocks.row_index, blocks.col_index
    return *tensors, *places, blocks.granule, backend


def unflatten(*flat: Any) -> tuple[Tensor, ExpertsAdapter, str]:
    """Inverse of :func:`flatten`."""
    weight, A, B, ends, ranks, scaling, *blocks, backend = flat
    return ends, ExpertsAdapter(weight, A, B, ExpertBlocks(*blocks), ranks, scaling), backend


def experts_linear(x: Tensor, ends: Tensor, adapter: ExpertsAdapter, backend: str) -> Tensor:
    """Compute `y_p = x_p W_effᵀ` with the W_eff of pair p's expert; differentiable in x, A and B.

    Saves x and references to the adapter for backward, and never makes a tensor of W0's size.

    Args:
        x: (P, C), a row for each pair of a token and one of its experts, sorted by expert, W0's dtype.
        ends: int32 (E,), how many pairs all experts up to each expert have; the last is P.
        adapter: of the experts.
        backend: the name of a resolved backend.

    Returns:
        y (P, N) in x's dtype.
    """
    y: Tensor = _experts(x, *flatten(ends, adapter, backend))
    return y


def _forward(x: Tensor, *flat: Any) -> Tensor:
    ends, adapter, backend = unflatten(*flat)
    with without_autocast(x):
        return load_experts_backend(backend).experts_forward(x, ends, adapter)


def _backward(dy: Tensor, x: Tensor | None, needs_x: bool, *flat: Any) -> Gradients:
    ends, adapter, backend = unflatten(*flat)
    with without_autocast(dy):
        gradients = load_experts_backend(backend).experts_backward(dy, x, ends, adapter, needs_x=needs_x)
    return or_empty(gradients, (dy, adapter.A, adapter.B))


def _forward_fake(x: Tensor, *flat: Any) -> Tensor:
    return x.new_empty(x.shape[0], flat[0].shape[1])


class _Experts(torch.autograd.Function):
    """`experts_linear` with its derivatives; its arguments are the operator's."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save x if the factors' gradients need it, the factors, and references to frozen tensors."""
        x, *flat = inputs
        _, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_A or needs_B else None, *flat[:_TENSORS])
        ctx.settings = flat[_TENSORS:]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in x, A and B."""
        x, *tensors = ctx.saved_tensors
        needs_x, _, needs_A, needs_B, *others = ctx.needs_input_grad
        dx, dA, dB = _experts_backward(dy, x, needs_x, *tensors, *ctx.settings)
        factors = dA if needs_A else None, dB if needs_B else None
        return dx if needs_x else None, None, *factors, *[None] * len(others)


def _no_further_derivative(ctx: Any, *grad_outputs: Any) -> Any:
    raise RuntimeError(
        "experts_linear has no second derivative and no forward mode; "
        "smoa_kernels.definition.experts.reference_experts_linear, in plain PyTorch, has both"
    )


class _ExpertsBackward(torch.autograd.Function):
    backward = staticmethod(_no_further_derivative)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
        """Save nothing."""


_, _experts = register(
    f"experts_linear(Tensor x, {_CALL}) -> Tensor",
    kernel=_forward,
    fake=_forward_fake,
    function=_Experts,
    formula=_no_further_derivative,
)
_, _experts_backward = register(
    f"experts_linear_backward(Tensor dy, Tensor? x, bool needs_x, {_CALL}) -> (Tensor dx, Tensor dA, Tensor dB)",
    kernel=_backward,
    fake=backward_fake,
    function=_ExpertsBackward,
    formula=_no_further_derivative,
)
