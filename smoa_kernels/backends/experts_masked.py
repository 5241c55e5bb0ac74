"""Experts in torch operators that do not wait for the device: every expert multiplies all pairs, masks select its own.

A CUDA graph takes this while it is captured if the kernels are not verified (`verified.py`). It does E times the work
of `experts.py`, which reads `ends` on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..definition.experts import ExpertsAdapter
from ..definition.precision import accumulate
from . import Gradients
from .block_order import row_panels

_PANEL = 4096  # pairs that are copied at a time, in A's dtype


class _Expert(NamedTuple):
    """An expert's W0, factors and pairs."""

    weight: Tensor  # W0 (N, C)
    A: Tensor  # (ρ, C), at least float32; its padding is zero
    B: Tensor  # (N, ρ), the same
    same: Tensor  # (N, C), where a row's and a column's blocks are equal
    modulation: Tensor  # s·BA, zero elsewhere
    pairs: Tensor  # (P, 1), whether a pair is this expert's


def experts_forward(x: Tensor, ends: Tensor, adapter: ExpertsAdapter) -> Tensor:
    """`y_p = x_p W_effᵀ` with the W_eff of pair p's expert: x (P, C) -> y (P, N) in x's dtype."""
    y = x.new_zeros(x.shape[0], adapter.weight.shape[1])
    for expert in _experts(x.shape[0], ends, adapter):
        delta = (expert.modulation * expert.weight).to(x.dtype)
        y = torch.where(expert.pairs, accumulate(x @ delta.T, x, expert.weight), y)
    return y


def experts_backward(
    dy: Tensor, x: Tensor | None, ends: Tensor, adapter: ExpertsAdapter, *, needs_x: bool
) -> Gradients:
    """Gradients (dX, dA, dB) of :func:`experts_forward`: dX where `needs_x`, dA and dB where x is given."""
    dx = dy.new_zeros(dy.shape[0], adapter.weight.shape[2]) if needs_x else None
    dA, dB = (None, None) if x is None else (torch.empty_like(adapter.A), torch.empty_like(adapter.B))
    for e, expert in enumerate(_experts(dy.shape[0], ends, adapter)):
        if dx is not None:
            W_eff = (expert.weight + expert.modulation * expert.weight).to(dy.dtype)
            dx = torch.where(expert.pairs, dy @ W_eff, dx)
        if x is not None and dA is not None and dB is not None:
            G = _sums(dy, x, expert)
            H = torch.where(expert.same, G * expert.weight.to(G.dtype) * adapter.scaling, 0)
            dA[e], dB[e] = expert.B.T @ H, H @ expert.A.T
    return dx, dA, dB


def _sums(dy: Tensor, x: Tensor, expert: _Expert) -> Tensor:
    """`G = Σ_p dy_pᵀ x_p` (N, C) over an expert's pairs, summed in A's dtype; only a panel's copies are as wide."""
    G = expert.A.new_zeros(expert.weight.shape)
    for panel in zip(*(row_panels(matrix, _PANEL) for matrix in (dy, x, expert.pairs)), strict=True):
        dy_part, x_part, pairs = panel
        G.addmm_(torch.where(pairs, dy_part, 0).to(G.dtype).T, torch.where(pairs, x_part, 0).to(G.dtype))
    return G


def _experts(pairs: int, ends: Tensor, adapter: ExpertsAdapter) -> Iterator[_Expert]:
    blocks, device = adapter.blocks, adapter.weight.device
    owner = torch.bucketize(torch.arange(pairs, dtype=ends.dtype, device=device), ends, right=True)[:, None]
    ranks = torch.arange(adapter.A.shape[1], device=device)
    dtype = torch.promote_types(adapter.weight.dtype, torch.float32)
    for e, (weight, A, B) in enumerate(zip(adapter.weight, adapter.A, adapter.B, strict=True)):
        rows = _labels(weight.shape[0], blocks.row_offsets, blocks.row_index, e)
        cols = _labels(weight.shape[1], blocks.col_offsets, blocks.col_index, e)
        A = torch.where(ranks[:, None] < adapter.ranks[cols], A, 0).to(dtype)
        B = torch.where(ranks < adapter.ranks[rows][:, None], B, 0).to(dtype)
        same = rows[:, None] == cols
        modulation = torch.where(same, B @ A * adapter.scaling, 0)
        yield _Expert(weight, A, B, same, modulation, owner == e)


def _labels(size: int, offsets: Tensor, index: Tensor | None, e: int) -> Tensor:
    """The block of each of expert e's rows, or columns."""
    slots = torch.arange(size, dtype=offsets.dtype, device=offsets.device)
    labels = torch.bucketize(slots, offsets[e % len(offsets)], right=True) - 1
    if index is None:
        return labels
    return torch.empty_like(labels).scatter_(0, index[e % len(index)].long(), labels)
