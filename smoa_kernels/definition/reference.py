"""The definition in plain PyTorch (docs/definition.md): a loop over blocks.

Slow and obvious. Every fast path is tested against it and its gradients by torch, and these against the C oracle.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import Dropout
from .packed import PackedAdapter


def delta_weight(adapter: PackedAdapter) -> Tensor:
    """Compute `ΔW[rows_k, cols_k] = s · (B_k A_k) ∘ W0[rows_k, cols_k]`, zero elsewhere; shape (N, C).

    Example:
        >>> from smoa_kernels import BlockPartition
        >>> halves = torch.tensor([0, 0, 1, 1])
        >>> partition, ranks = BlockPartition.from_labels(halves, halves, 2), torch.tensor([1, 1])
        >>> weight, A, B = torch.full((4, 4), 3.0), torch.ones(1, 4), torch.ones(4, 1)
        >>> delta_weight(PackedAdapter(weight, A, B, partition, ranks, torch.tensor(2.0)))[0].tolist()
        [6.0, 6.0, 0.0, 0.0]
    """
    weight, A, B, partition = adapter.weight, adapter.A, adapter.B, adapter.partition
    delta = torch.zeros_like(weight)
    for k, rank in enumerate(adapter.ranks.tolist()):
        rows, cols = partition.rows(k), partition.cols(k)
        block = (rows[:, None], cols)
        product = B[rows, :rank] @ A[:rank, cols]
        delta = delta.index_put(block, (adapter.scaling * product * weight[block]).to(delta.dtype))
    return delta


def forward(
    x: Tensor, bias: Tensor | None, adapter: PackedAdapter, algorithm: str, dropout: Dropout | None
) -> Tensor:
    """Compute `y = x W0ᵀ + b + dropout(x) ΔWᵀ` for x (..., C); y (..., N) (docs/definition.md).

    Nothing is checked. The dropout mask is the eager backend's. Torch differentiates it in any mode, any number of
    times.

    Args:
        algorithm: any; there is one way.
        dropout: the active one, or None.
    """
    return F.linear(x, adapter.weight, bias) + F.linear(_dropped(x, dropout), delta_weight(adapter))


def backward(
    dy: Tensor, x: Tensor | None, adapter: PackedAdapter, dropout: Dropout | None, *, needs_x: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (dX, dA, dB) of :func:`forward` by torch: dX where `needs_x`, dA and dB where x is given."""
    # Without x only dX is needed, which does not depend on x.
    at = dy.new_zeros(*dy.shape[:-1], adapter.weight.shape[1]) if x is None else x

    def y(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return forward(x, None, replace(adapter, A=A, B=B), "auto", dropout)

    dx, dA, dB = torch.func.vjp(y, at, adapter.A, adapter.B)[1](dy)
    return dx if needs_x else None, *((None, None) if x is None else (dA, dB))


def _dropped(x: Tensor, dropout: Dropout | None) -> Tensor:
    if dropout is None:
        return x
    # Drawn for a plain tensor of x's shape: under `torch.func` x may be batched, but the mask is not.
    shape = x.shape[:-1].numel(), x.shape[-1]
    return x * dropout.multiplier(torch.empty(shape, dtype=x.dtype, device=x.device)).view(x.shape)
