"""The definition in plain PyTorch (docs/definition.md): a loop over blocks.

Slow and obvious. Every fast path is tested against `forward` and its gradients by autograd, and these are tested
against the C oracle. `backward` has the gradients written out. Torch differentiates both, any number of times.
"""

from __future__ import annotations

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
    """Compute `y = x W0ᵀ + b + dropout(x) ΔWᵀ` for x (..., C), by any algorithm in one way; nothing is checked."""
    return F.linear(x, adapter.weight, bias) + F.linear(_dropped(x, dropout), delta_weight(adapter))


def backward(
    dy: Tensor, x: Tensor | None, adapter: PackedAdapter, dropout: Dropout | None, *, needs_x: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (dX, dA, dB) of :func:`forward`: dX where `needs_x`, dA and dB where x is given."""
    dx = input_gradient(dy, adapter, dropout) if needs_x else None
    dA, dB = (None, None) if x is None else factor_gradients(dy, x, adapter, dropout)
    return dx, dA, dB


def input_gradient(dy: Tensor, adapter: PackedAdapter, dropout: Dropout | None) -> Tensor:
    """`dX = dY W0 + dropoutᵀ(dY ΔW)`."""
    return dy @ adapter.weight + _dropped(dy @ delta_weight(adapter), dropout)


def factor_gradients(
    dy: Tensor, x: Tensor, adapter: PackedAdapter, dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    """(dA, dB): `H_k = s·(dY_kᵀ dropout(x)_k) ∘ W0_k`, `dA_k = B_kᵀ H_k`, `dB_k = H_k A_kᵀ`."""
    A, B, partition = adapter.A, adapter.B, adapter.partition
    dA, dB = torch.zeros_like(A), torch.zeros_like(B)
    dropped, slots = _dropped(x, dropout), torch.arange(A.shape[0], device=A.device)
    for k, rank in enumerate(adapter.ranks.tolist()):
        rows, cols = partition.rows(k), partition.cols(k)
        G = dy[:, rows].T @ dropped[:, cols]
        H = (adapter.scaling * G * adapter.weight[rows[:, None], cols]).to(A.dtype)
        dA = dA.index_put((slots[:rank, None], cols), B[rows, :rank].T @ H)
        dB = dB.index_put((rows[:, None], slots[:rank]), H @ A[:rank, cols].T)
    return dA, dB


def _dropped(x: Tensor, dropout: Dropout | None) -> Tensor:
    if dropout is None:
        return x
    # Drawn for a plain tensor of x's shape: under `torch.func` x may be batched, but the mask is not.
    shape = x.shape[:-1].numel(), x.shape[-1]
    return x * dropout.multiplier(torch.empty(shape, dtype=x.dtype, device=x.device)).view(x.shape)
