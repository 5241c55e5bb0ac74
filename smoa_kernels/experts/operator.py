"""The `smoa::experts_linear` operator, its gradient and their fake forms: `smoa::linear` for pairs sorted by expert.

Opaque for the same reasons. How many pairs an expert has crosses as a tensor, so that no graph bakes it in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import load_experts_backend
from ..definition.experts import ExpertBlocks, ExpertsAdapter
from ..definition.precision import without_autocast
from ..operator import can_skip_dispatcher

__all__ = ["ExpertsCall", "experts_linear", "experts_product"]


class ExpertsCall(NamedTuple):
    """What forward and backward of one call share.

    Attributes:
        ends: int32 (E,), how many pairs the experts up to each have together.
        adapter: W0, the factors, their blocks and ranks, and s.
        backend: the name of a resolved backend.
    """

    ends: Tensor
    adapter: ExpertsAdapter
    backend: str

    def flatten(self) -> tuple[Any, ...]:
        """The arguments of `SCHEMA`."""
        adapter, blocks = self.adapter, self.adapter.blocks
        return (
            *(self.ends, adapter.weight, adapter.A, adapter.B, adapter.ranks, adapter.scaling),
            *(blocks.row_offsets, blocks.col_offsets, blocks.row_index, blocks.col_index),
            *(blocks.granule, self.backend),
        )

    @staticmethod
    def unflatten(
        ends: Tensor,
        weight: Tensor,
        A: Tensor,
        B: Tensor,
        ranks: Tensor,
        scaling: Tensor,
        row_offsets: Tensor,
        col_offsets: Tensor,
        row_index: Tensor | None,
        col_index: Tensor | None,
        granule: int,
        backend: str,
    ) -> ExpertsCall:
        """Inverse of :meth:`flatten`."""
        blocks = ExpertBlocks(row_offsets, col_offsets, row_index, col_index, granule)
        return ExpertsCall(ends, ExpertsAdapter(weight, A, B, blocks, ranks, scaling), backend)


SCHEMA = (
    "Tensor ends, Tensor weight, Tensor A, Tensor B, Tensor ranks, Tensor scaling, Tensor row_offsets, "
    "Tensor col_offsets, Tensor? row_index, Tensor? col_index, int granule, str backend"
)
"""An `ExpertsCall` as arguments of an operator: those of :meth:`ExpertsCall.unflatten`."""

_LIBRARY = torch.library.Library("smoa", "FRAGMENT")
_LIBRARY.define(f"experts_linear(Tensor x, {SCHEMA}) -> Tensor")
_LIBRARY.define(
    f"experts_linear_backward(Tensor dy, Tensor? x, bool needs_x, {SCHEMA}) -> (Tensor dx, Tensor dA, Tensor dB)"
)
_linear: Any = torch.ops.smoa.experts_linear.default
_linear_backward: Any = torch.ops.smoa.experts_linear_backward.default


def experts_linear(x: Tensor, ends: Tensor, adapter: ExpertsAdapter, backend: str) -> Tensor:
    """Compute `y_p = x_p W_effᵀ` with the W_eff of pair p's expert; differentiable in x, A and B.

    Saves x and references to the adapter for backward, and never makes anything of W0's size.

    Args:
        x: (P, C), a row for each pair of a token and one of its experts, sorted by expert, W0's dtype.
        ends: int32 (E,), how many pairs the experts up to each have together; the last is P.
        adapter: of the experts.
        backend: the name of a resolved backend.

    Returns:
        y (P, N) in x's dtype.

    Raises:
        RuntimeError: a second or a forward-mode derivative is asked for.

    Example:
        >>> blocks = ExpertBlocks.from_labels(torch.tensor([[0, 1]]), torch.tensor([[0, 0, 1]]), num_blocks=2)
        >>> weight, A, B = torch.ones(4, 2, 3), torch.ones(4, 1, 3), torch.ones(4, 2, 1)
        >>> adapter = ExpertsAdapter(weight, A, B, blocks, torch.tensor([1, 1]).int(), torch.tensor(0.5))
        >>> experts_linear(torch.ones(2, 3), torch.tensor([0, 1, 1, 2]).int(), adapter, "eager").tolist()
        [[4.0, 3.5], [4.0, 3.5]]
    """
    return experts_product(x, ends, adapter, backend)(x)


def experts_product(
    source: Tensor, ends: Tensor, adapter: ExpertsAdapter, backend: str
) -> Callable[[Tensor], Tensor]:
    """Prepare :func:`experts_linear` for an x that is yet to be computed: what is returned takes it and gives y.

    Args:
        source: what x is to be computed from: x is as plain a tensor, on its device.
        ends, adapter, backend: those of :func:`experts_linear`.
    """
    # Of one token the dispatcher's two passes are a tenth.
    plain = not torch.is_grad_enabled() and forward_ad._current_level < 0
    plain = plain and can_skip_dispatcher(source, ends, adapter.weight, adapter.A, adapter.B)
    if plain and not torch.is_autocast_enabled(source.device.type):
        return load_experts_backend(backend).experts_product(ends, adapter)
    flat = ExpertsCall(ends, adapter, backend).flatten()
    return lambda x: cast(Tensor, _linear(x, *flat))


def _forward(x: Tensor, *flat: Any) -> Tensor:
    call = ExpertsCall.unflatten(*flat)
    with without_autocast(x):
        return load_experts_backend(call.backend).experts_product(call.ends, call.adapter)(x)


def _backward(dy: Tensor, x: Tensor | None, needs_x: bool, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = ExpertsCall.unflatten(*flat)
    adapter = call.adapter
    with without_autocast(dy):
        dx, dA, dB = load_experts_backend(call.backend).experts_backward(
            dy, x, call.ends, adapter, needs_x=needs_x
        )
    return (
        dy.new_empty(0) if dx is None else dx,
        adapter.A.new_empty(0) if dA is None else dA,
        adapter.B.new_empty(0) if dB is None else dB,
    )


def _forward_fake(x: Tensor, *flat: Any) -> Tensor:
    return x.new_empty(x.shape[0], ExpertsCall.unflatten(*flat).adapter.weight.shape[1])


def _backward_fake(dy: Tensor, x: Tensor | None, needs_x: bool, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    adapter = ExpertsCall.unflatten(*flat).adapter
    return (
        dy.new_empty(dy.shape[0], adapter.weight.shape[2]) if needs_x else dy.new_empty(0),
        adapter.A.new_empty(0 if x is None else adapter.A.shape),
        adapter.B.new_empty(0 if x is None else adapter.B.shape),
    )


class _Experts(torch.autograd.Function):
    """Saves x, the factors and references to frozen tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, *flat: Any) -> Any:
        """A and B are the call's: autograd sees only tensors that are arguments of their own."""
        needs_factors = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        tensors, ctx.settings = flat[:-2], flat[-2:]
        ctx.save_for_backward(x if needs_factors else None, *tensors)
        with torch._C._AutoDispatchBelowAutograd():
            return _linear(x, *flat)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        needs_x, needs_A, needs_B, *_ = ctx.needs_input_grad
        dx, dA, dB = _linear_backward(dy, x, needs_x, *tensors, *ctx.settings)
        rest = (None,) * (len(tensors) + len(ctx.settings))
        return dx if needs_x else None, dA if needs_A else None, dB if needs_B else None, *rest


class _ExpertsBackward(torch.autograd.Function):
    """Says that there is no second derivative, when one is asked for."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor | None, A: Tensor, B: Tensor, *rest: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return _linear_backward(dy, x, *rest)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"experts_linear has no second derivative; {_PLAIN}")


_PLAIN = "smoa_kernels.definition.experts.reference_experts_linear, in plain PyTorch, has one"


_apply: Any = _Experts.apply  # which torch does not type
_apply_backward: Any = _ExpertsBackward.apply


def _recorded_forward(x: Tensor, *flat: Any) -> Any:
    _, _, A, B, *_ = flat
    tensors = [one for one in (x, *flat) if isinstance(one, Tensor)]
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(one).tangent is not None for one in tensors
    ):
        # Computed all the same, the result would have no tangent, which counts as zero.
        raise RuntimeError(f"experts_linear has no forward-mode derivative; {_PLAIN}")
    if torch.is_grad_enabled() and (x.requires_grad or A.requires_grad or B.requires_grad):
        return _apply(x, A, B, *flat)
    with torch._C._AutoDispatchBelowAutograd():
        return _linear(x, *flat)


def _recorded_backward(dy: Tensor, x: Tensor | None, needs_x: bool, *flat: Any) -> Any:
    given = [one for one in (dy, x, flat[2], flat[3]) if one is not None]
    if torch.is_grad_enabled() and any(one.requires_grad for one in given):
        return _apply_backward(dy, x, flat[2], flat[3], needs_x, *flat)
    with torch._C._AutoDispatchBelowAutograd():
        return _linear_backward(dy, x, needs_x, *flat)


for _name, _compute, _recorded, _fake in (
    ("experts_linear", _forward, _recorded_forward, _forward_fake),
    ("experts_linear_backward", _backward, _recorded_backward, _backward_fake),
):
    _LIBRARY.impl(_name, _compute, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _recorded, "Autograd")
    torch.library.register_fake(f"smoa::{_name}", _fake, lib=_LIBRARY)
