"""Experts in torch operators: the pairs of each expert are a layer's tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..definition.experts import ExpertsAdapter
from ..definition.packed import PackedAdapter
from . import Gradients, eager


def experts_forward(x: Tensor, ends: Tensor, adapter: ExpertsAdapter) -> Tensor:
    """`y_p = x_p W_effᵀ` with the W_eff of pair p's expert: x (P, C) -> y (P, N) in x's dtype.

    The base's part is a product of its own, so that y equals that of the model without an adapter if B is zero.
    """
    y = x.new_empty(x.shape[0], adapter.weight.shape[1])
    for _, pairs, layer in _active(len(x), ends, adapter):
        if x.itemsize > 2:
            base_output(x[pairs], layer.weight, out=y[pairs]).add_(eager.adapter_output(x[pairs], layer))
        elif layer.B.any() and layer.scaling:
            y[pairs] = eager.forward(x[pairs], None, layer, "auto", None)
        else:
            base_output(x[pairs], layer.weight, out=y[pairs])
    return y


def experts_backward(
    dy: Tensor, x: Tensor | None, ends: Tensor, adapter: ExpertsAdapter, *, needs_x: bool
) -> Gradients:
    """Gradients (dX, dA, dB) of :func:`experts_forward`: dX where `needs_x`, dA and dB where x is given."""
    dx = dy.new_empty(dy.shape[0], adapter.weight.shape[2]) if needs_x else None
    dA, dB = (None, None) if x is None else (torch.zeros_like(adapter.A), torch.zeros_like(adapter.B))
    for e, pairs, layer in _active(len(dy), ends, adapter):
        given = None if x is None else x[pairs]
        dx_e, dA_e, dB_e = eager.backward(dy[pairs], given, layer, None, needs_x=needs_x)
        if dx is not None and dx_e is not None:
            dx[pairs] = dx_e
        if dA is not None and dA_e is not None and dB is not None and dB_e is not None:
            dA[e], dB[e] = dA_e, dB_e
    return dx, dA, dB


def base_output(x: Tensor, weight: Tensor, *, out: Tensor) -> Tensor:
    """Write `x W0ᵀ` for the pairs x of one expert to `out`.

    transformers' experts call torch's `grouped_mm`, which on a CPU computes this product of the same operands for each
    expert. So the bits are the same.
    """
    return torch.mm(x, weight.T, out=out)


def spans(ends: Tensor) -> list[tuple[int, int, int]]:
    """Each expert that has pairs: its number, its first pair and where its pairs end."""
    last = ends.tolist()
    pairs = enumerate(zip([0, *last[:-1]], last, strict=True))
    return [(e, start, end) for e, (start, end) in pairs if end > start]


def _active(total: int, ends: Tensor, adapter: ExpertsAdapter) -> Iterator[tuple[int, slice, PackedAdapter]]:
    """Each expert that has pairs: its number, its pairs and its adapter."""
    filled, last = spans(ends), ends.tolist()
    if last != sorted(last) or last[0] < 0 or last[-1] != total:
        raise ValueError(f"ends must count x's {total} pairs up, got {last}")
    for (e, start, end), layer in zip(filled, adapter.experts([e for e, _, _ in filled]), strict=True):
        yield e, slice(start, end), layer
