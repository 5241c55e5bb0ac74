"""The definition in plain PyTorch (docs/definition.md): a loop over blocks.

Slow and obvious. Every fast path is tested against `reference_linear` and the gradients that autograd makes of it,
and these against the C oracle. `forward` and `backward` are the same as a backend, the gradients written out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import check_arguments, check_ranks, global_width
from .dropout import Dropout
from .packed import PackedAdapter
from .partition import BlockPartition

__all__ = ["reference_delta_weight", "reference_linear"]

# Different ways to one number, which it computes its own way.
ALGORITHMS = ("merged", "split", "expanded", "fused")


def reference_delta_weight(
    weight: Tensor, A: Tensor, B: Tensor, partition: BlockPartition, ranks: Tensor, *, scaling: float | Tensor
) -> Tensor:
    """`ΔW[rows_k, cols_k] = s · (B_k A_k) ∘ W0[rows_k, cols_k]`, zero elsewhere; shape (N, C).

    Args:
        weight: W0 (N, C).
        A: packed (ρ, C).
        B: packed (N, ρ).
        partition: blocks of W0.
        ranks: int (K,), r_k ≤ ρ.
        scaling: s.

    Raises:
        TypeError, ValueError: naming the argument, as :func:`reference_linear` does.

    Example:
        >>> halves = torch.tensor([0, 0, 1, 1])
        >>> partition, ranks = BlockPartition.from_labels(halves, halves, 2), torch.tensor([1, 1])
        >>> weight, A, B = torch.full((4, 4), 3.0), torch.ones(1, 4), torch.ones(4, 1)
        >>> reference_delta_weight(weight, A, B, partition, ranks, scaling=2.0)[0].tolist()
        [6.0, 6.0, 0.0, 0.0]
    """
    if isinstance(ranks, Tensor) and ranks.dtype == torch.int64:
        ranks = ranks.int()
    check_arguments(
        weight, weight, None, A, B, partition, ranks, scaling=scaling, dropout_p=0.0, dropout_seed=None
    )
    check_ranks(ranks, None, A.shape[0])
    return _delta(weight, A, B, partition, ranks, scaling)


def _delta(
    weight: Tensor, A: Tensor, B: Tensor, partition: BlockPartition, ranks: Tensor, scaling: float | Tensor
) -> Tensor:
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
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    column_offset: int = 0,
    global_in_features: int | None = None,
) -> Tensor:
    """`y = x W0ᵀ + b + dropout(x) ΔWᵀ` for x (..., C); y (..., N) (docs/definition.md).

    Arguments and errors are those of :func:`smoa_kernels.smoa_linear`; the dropout mask is the eager backend's, and
    its seed must be given. Unlike that function it has a second derivative.

    Raises:
        TypeError, ValueError: as `smoa_linear` does; a dropout without a seed.

    Example:
        >>> weight = torch.randn(6, 4)
        >>> partition = BlockPartition.from_weight(weight, num_blocks=2)
        >>> A, B, ranks = torch.randn(1, 4), torch.zeros(6, 1), torch.ones(2, dtype=torch.int32)
        >>> reference_linear(torch.randn(3, 4), weight, None, A, B, partition, ranks, scaling=0.5).shape
        torch.Size([3, 6])
    """
    check_arguments(
        x,
        weight,
        bias,
        A,
        B,
        partition,
        ranks,
        scaling=scaling,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
    )
    check_ranks(ranks, None, A.shape[0])
    width = global_width(x, column_offset, global_in_features)
    if dropout_p > 0 and dropout_seed is None:
        raise ValueError("dropout_seed must be given where dropout_p > 0, got None")
    delta = _delta(weight, A, B, partition, ranks, scaling)
    dropped = x
    if dropout_seed is not None and dropout_p > 0:
        flat = x.reshape(-1, x.shape[-1])
        dropout = Dropout(dropout_seed, dropout_p, column_offset, width)
        dropped = (flat * dropout.multiplier(flat)).reshape(x.shape)
    return F.linear(x, weight, bias) + F.linear(dropped, delta)


def forward(
    x: Tensor, bias: Tensor | None, adapter: PackedAdapter, algorithm: str, dropout: Dropout | None
) -> Tensor:
    """`y = x W0ᵀ + b + dropout(x) ΔWᵀ`: x (T, C) -> y (T, N)."""
    return F.linear(x, adapter.weight, bias) + F.linear(_dropped(x, dropout), _delta_of(adapter))


def backward(
    dy: Tensor, x: Tensor | None, adapter: PackedAdapter, dropout: Dropout | None, *, needs_x: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (dX, dA, dB) of :func:`forward`: dX where `needs_x`, dA and dB where x is given."""
    dx = dA = dB = None
    if needs_x:
        dx = dy @ adapter.weight + _dropped(dy @ _delta_of(adapter), dropout)
    if x is not None:
        A, B, partition = adapter.A, adapter.B, adapter.partition
        dA, dB = torch.zeros_like(A), torch.zeros_like(B)
        dropped = _dropped(x, dropout)
        for k, rank in enumerate(adapter.ranks.tolist()):
            rows, cols = partition.rows(k), partition.cols(k)
            G = dy[:, rows].T @ dropped[:, cols]
            H = (adapter.scaling * G * adapter.weight[rows[:, None], cols]).to(A.dtype)
            dA[:rank, cols] = B[rows, :rank].T @ H
            dB[rows, :rank] = H @ A[:rank, cols].T
    return dx, dA, dB


def _delta_of(adapter: PackedAdapter) -> Tensor:
    return _delta(adapter.weight, adapter.A, adapter.B, adapter.partition, adapter.ranks, adapter.scaling)


def _dropped(x: Tensor, dropout: Dropout | None) -> Tensor:
    return x if dropout is None else x * dropout.multiplier(x)
