"""Experts in torch operators: each expert that has pairs is a layer of the eager backend."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..definition.experts import ExpertsAdapter
from ..definition.packed import PackedAdapter
from . import Gradients, eager

__all__ = ["experts_backward", "experts_forward"]


def experts_forward(x: Tensor, ends: Tensor, adapter: ExpertsAdapter) -> Tensor:
    """`y_p = x_p W_effᵀ` with the W_eff of pair p's expert: x (P, C) -> y (P, N) in x's dtype."""
    y = x.new_zeros(x.shape[0], adapter.weight.shape[1])
    for _, pairs, layer in _active(len(x), ends, adapter):
        y[pairs] = eager.forward(x[pairs], None, layer, "auto", None)
    return y


def experts_backward(
    dy: Tensor, x: Tensor | None, ends: Tensor, adapter: ExpertsAdapter, *, needs_x: bool
) -> Gradients:
    """Gradients (dX, dA, dB) of :func:`experts_forward`: dX where `needs_x`, dA and dB where x is given."""
    dx = dy.new_zeros(dy.shape[0], adapter.weight.shape[2]) if needs_x else None
    dA, dB = (None, None) if x is None else (torch.zeros_like(adapter.A), torch.zeros_like(adapter.B))
    for e, pairs, layer in _active(len(dy), ends, adapter):
        if dx is not None:
            dx[pairs] = eager.input_gradient(dy[pairs], layer)
        if x is not None and dA is not None and dB is not None:
            dA[e], dB[e] = eager.factor_gradients(dy[pairs], x[pairs], layer)
    return dx, dA, dB


def _active(total: int, ends: Tensor, adapter: ExpertsAdapter) -> Iterator[tuple[int, slice, PackedAdapter]]:
    """Each expert that has pairs: its number, its pairs and its adapter."""
    last = ends.tolist()
    if last[-1] != total:
        raise ValueError(f"ends must count x's {total} pairs up, got {last[-1]} in the end")
    spans = [
        (e, slice(start, end))
        for e, (start, end) in enumerate(zip([0, *last[:-1]], last, strict=True))
        if end > start
    ]
    for (e, pairs), layer in zip(spans, adapter.experts([e for e, _ in spans]), strict=True):
        yield e, pairs, layer
