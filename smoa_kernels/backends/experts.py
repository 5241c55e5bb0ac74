"""Experts in torch operators: each expert that has pairs is a layer of its own."""

from __future__ import annotations

from torch import Tensor

from ..definition.experts import ExpertsAdapter
from . import Gradients, eager

__all__ = ["experts_backward", "experts_forward"]


def experts_forward(x: Tensor, ends: Tensor, adapter: ExpertsAdapter) -> Tensor:
    """`y_p = x_p W_effᵀ` with the W_eff of pair p's expert: x (P, C) -> y (P, N) in x's dtype."""
    y = x.new_zeros(x.shape[0], adapter.weight.shape[1])
    start = 0
    for number, end in enumerate(ends.tolist()):
        if end > start:
            y[start:end] = eager.forward(x[start:end], None, adapter.expert(number), "auto", None)
        start = end
    return y


def experts_backward(
    dy: Tensor, x: Tensor | None, ends: Tensor, adapter: ExpertsAdapter, *, needs_x: bool
) -> Gradients:
    """Gradients (dX, dA, dB) of :func:`experts_forward`: dX where `needs_x`, dA and dB where x is given."""
    dx = dy.new_zeros(dy.shape[0], adapter.weight.shape[2]) if needs_x else None
    dA, dB = (
        (None, None)
        if x is None
        else (adapter.A.new_zeros(adapter.A.shape), adapter.B.new_zeros(adapter.B.shape))
    )
    start = 0
    for number, end in enumerate(ends.tolist()):
        if end > start:
            rows = None if x is None else x[start:end]
            found = eager.backward(dy[start:end], rows, adapter.expert(number), None, needs_x=needs_x)
            for into, value in zip(
                (
                    None if dx is None else dx[start:end],
                    None if dA is None else dA[number],
                    None if dB is None else dB[number],
                ),
                found,
                strict=True,
            ):
                if into is not None and value is not None:
                    into.copy_(value)
        start = end
    return dx, dA, dB
