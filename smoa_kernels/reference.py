"""The definition in plain PyTorch (docs/definition.md): a loop over blocks, autograd's own gradients.

Slow and obvious. Every fast path is tested against these two functions, and these two against the C oracle.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import Dropout
from .partition import BlockPartition

__all__ = ["reference_delta_weight", "reference_linear"]


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
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    column_offset: int = 0,
    global_in_features: int | None = None,
) -> Tensor:
    """`y = x W0ᵀ + b + dropout(x) ΔWᵀ` for x (..., C); y (..., N).

    Arguments are those of :func:`smoa_kernels.smoa_linear`; the dropout mask is the eager backend's.
    """
    delta = reference_delta_weight(weight, A, B, partition, ranks, scaling=scaling)
    dropped = x
    if dropout_p > 0:
        if dropout_seed is None:
            raise ValueError("dropout_seed must be given where dropout_p > 0, got None")
        flat = x.reshape(-1, x.shape[-1])
        dropout = Dropout(dropout_seed, dropout_p, column_offset, global_in_features or flat.shape[1])
        dropped = (flat * dropout.multiplier(flat)).reshape(x.shape)
    return F.linear(x, weight, bias) + F.linear(dropped, delta)
