"""The definition in plain PyTorch (docs/definition.md): a loop over blocks.

Slow and obvious. Every fast path is tested against `reference_linear` and its gradients by autograd, and these are
tested against the C oracle. `forward` and `backward` do the same for a `PackedAdapter`, with the gradients written out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import Dropout
from .packed import PackedAdapter
from .partition import BlockPartition


def reference_delta_weight(
    weight: Tensor, A: Tensor, B: Tensor, partition: BlockPartition, ranks: Tensor, *, scaling: float | Tensor
) -> Tensor:
    """Compute `ΔW[rows_k, cols_k] = s · (B_k A_k) ∘ W0[rows_k, cols_k]`, zero elsewhere; shape (N, C).

    Args:
        weight: W0 (N, C).
        A: packed (ρ, C).
        B: packed (N, ρ).
        partition: blocks of W0.
        ranks: int (K,), r_k ≤ ρ.
        scaling: s.

    Example:
        >>> halves = torch.tensor([0, 0, 1, 1])
        >>> partition, ranks = BlockPartition.from_labels(halves, halves, 2), torch.tensor([1, 1])
        >>> weight, A, B = torch.full((4, 4), 3.0), torch.ones(1, 4), torch.ones(4, 1)
        >>> reference_delta_weight(weight, A, B, partition, ranks, scaling=2.0)[0].tolist()
        [6.0, 6.0, 0.0, 0.0]
    """
    delta = torch.zeros_like(weight)
    for k, rank in enumerate(ranks.tolist()):
        rows, cols = partition.rows(k), partition.cols(k)
        block = (rows[:, None], cols)
        product = B[rows, :rank] @ A[:rank, cols]
        delta = delta.index_put(block, (scaling * product * weight[block]).to(delta.dtype))
    return delta


def reference_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    partition: BlockPartition,
    ranks: Tensor,
    *,
    scaling: float | Tensor,
    dropout: Dropout | None = None,
) -> Tensor:
    """Compute `y = x W0ᵀ + b + dropout(x) ΔWᵀ` for x (..., C); y (..., N) (docs/definition.md).

    Nothing is checked. The dropout mask is the eager backend's. Torch differentiates it in any mode, any number of
    times.

    Args:
        dropout: the active one, or None; the others are those of :func:`smoa_kernels.smoa_linear`.

    Example:
        >>> weight = torch.randn(6, 4)
        >>> partition = BlockPartition.from_weight(weight, num_blocks=2)
        >>> A, B, ranks = torch.randn(1, 4), torch.zeros(6, 1), torch.ones(2, dtype=torch.int32)
        >>> reference_linear(torch.randn(3, 4), weight, None, A, B, partition, ranks, scaling=0.5).shape
        torch.Size([3, 6])
    """
    delta = reference_delta_weight(weight, A, B, partition, ranks, scaling=scaling)
    return F.linear(x, weight, bias) + F.linear(_dropped(x, dropout), delta)


def forward(
    x: Tensor, bias: Tensor | None, adapter: PackedAdapter, algorithm: str, dropout: Dropout | None
) -> Tensor:
    """`y = x W0ᵀ + b + dropout(x) ΔWᵀ`: x (T, C) -> y (T, N)."""
    a = adapter
    return reference_linear(
        x, a.weight, bias, a.A, a.B, a.partition, a.ranks, scaling=a.scaling, dropout=dropout
    )


def backward(
    dy: Tensor, x: Tensor | None, adapter: PackedAdapter, dropout: Dropout | None, *, needs_x: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (dX, dA, dB) of :func:`forward`: dX where `needs_x`, dA and dB where x is given."""
    dx = input_gradient(dy, adapter, dropout) if needs_x else None
    dA, dB = (None, None) if x is None else factor_gradients(dy, x, adapter, dropout)
    return dx, dA, dB


def input_gradient(dy: Tensor, adapter: PackedAdapter, dropout: Dropout | None) -> Tensor:
    """`dX = dY W0 + dropoutᵀ(dY ΔW)`."""
    return dy @ adapter.weight + _dropped(dy @ _delta(adapter), dropout)


def factor_gradients(
    dy: Tensor, x: Tensor, adapter: PackedAdapter, dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    """(dA, dB): `H_k = s·(dY_kᵀ dropout(x)_k) ∘ W0_k`, `dA_k = B_kᵀ H_k`, `dB_k = H_k A_kᵀ`."""
    A, B, partition = adapter.A, adapter.B, adapter.partition
    dA, dB = torch.zeros_like(A), torch.zeros_like(B)
    dropped = _dropped(x, dropout)
    for k, rank in enumerate(adapter.ranks.tolist()):
        rows, cols = partition.rows(k), partition.cols(k)
        G = dy[:, rows].T @ dropped[:, cols]
        H = (adapter.scaling * G * adapter.weight[rows[:, None], cols]).to(A.dtype)
        dA[:rank, cols] = B[rows, :rank].T @ H
        dB[rows, :rank] = H @ A[:rank, cols].T
    return dA, dB


def _delta(adapter: PackedAdapter) -> Tensor:
    return reference_delta_weight(
        adapter.weight, adapter.A, adapter.B, adapter.partition, adapter.ranks, scaling=adapter.scaling
    )


def _dropped(x: Tensor, dropout: Dropout | None) -> Tensor:
    if dropout is None:
        return x
    # Drawn for a plain tensor of x's shape: under `torch.func` x may be batched, but the mask is not.
    shape = x.shape[:-1].numel(), x.shape[-1]
    return x * dropout.multiplier(torch.empty(shape, dtype=x.dtype, device=x.device)).view(x.shape)
