"""The packed form of an adapter: one A (ρ, C) and one B (N, ρ) in the layer's own coordinates.

    W_eff[i, j] = W0[i, j] · (1 + s · [b(i) = c(j)] · Σ_t B[i, t] A[t, j])          (DESIGN section 1)

Column j of A holds its block's A_k, so ρ = max r_k and rows t ≥ r_k are padding: they never reach an output,
their gradient is zero, and they are never counted as parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .partition import BlockPartition

__all__ = ["PackedAdapter", "pack_factors", "split_rank", "trainable_parameters", "unpack_factors"]


@dataclass(frozen=True)
class PackedAdapter:
    """Everything that defines W_eff: W0, the factors, the partition and the scaling.

    Attributes:
        weight: W0 (N, C), any strides.
        A: (ρ, C).
        B: (N, ρ).
        partition: blocks of W0's rows and columns.
        ranks: int32 (K,) rank r_k of each block.
        scaling: 0-d tensor, s.
    """

    weight: Tensor
    A: Tensor
    B: Tensor
    partition: BlockPartition
    ranks: Tensor
    scaling: Tensor

    @property
    def T(self) -> PackedAdapter:
        """The adapter of W_effᵀ: with rows and columns swapped the same formula holds.

        What computes `x W_effᵀ` therefore also computes `dX = dY W_eff`.
        """
        return replace(self, weight=self.weight.T, A=self.B.T, B=self.A.T, partition=self.partition.T)

    def expanded_factors(self) -> tuple[Tensor, Tensor]:
        """Zero-padded factors: Ã (r, C) and B̃ (N, r), r = Σ r_k, with s·B̃ Ã = s·mask·(BA).

        One slot per (block, rank): slot (k, t) of Ã is A's row t on the columns of block k, zero elsewhere.
        s is folded into B̃. Computed in the dtype of the factors.
        """
        p, rho = self.partition, self.A.shape[0]
        slot = torch.arange(rho, device=self.ranks.device)
        block, t = (slot < self.ranks[:, None]).nonzero(as_tuple=True)
        A = self.A.index_select(0, t).mul_(p.col_block == block[:, None])
        B = self.B.index_select(1, t).mul_(p.row_block[:, None] == block).mul_(self.scaling)
        return A, B

    def blocks(self) -> list[tuple[Tensor, Tensor, int]]:
        """Per block: A_k (r_k, C_k), B_k (N_k, r_k) in `col_index` / `row_index` order, and r_k."""
        p = self.partition
        A = self.A.index_select(1, p.col_index).split(p.col_sizes, 1)
        B = self.B.index_select(0, p.row_index).split(p.row_sizes, 0)
        return [(A[k][:r], B[k][:, :r], r) for k, r in enumerate(self.ranks.tolist())]


def split_rank(rank: int, num_blocks: int) -> list[int]:
    """Share a rank budget: block k gets `rank // K + (k < rank % K)`.

    Example:
        >>> split_rank(8, 3)
        [3, 3, 2]
    """
    return [rank // num_blocks + (k < rank % num_blocks) for k in range(num_blocks)]


def trainable_parameters(partition: BlockPartition, ranks: Sequence[int]) -> int:
    """`Σ r_k (N_k + C_k)`: what an adapter trains, padding not counted."""
    sizes = zip(ranks, partition.row_sizes, partition.col_sizes, strict=True)
    return sum(r * (rows + cols) for r, rows, cols in sizes)


def padding_masks(partition: BlockPartition, ranks: Tensor, rho: int) -> tuple[Tensor, Tensor]:
    """Bool masks of A (ρ, C) and B (N, ρ): True where an entry is a parameter, False where it is padding."""
    slot = torch.arange(rho, device=ranks.device)
    return slot[:, None] < ranks[partition.col_block.long()], slot < ranks[partition.row_block.long(), None]


def pack_factors(
    A_blocks: Sequence[Tensor], B_blocks: Sequence[Tensor], partition: BlockPartition
) -> tuple[Tensor, Tensor, Tensor]:
    """Pack per-block factors, as the paper's code keeps them, into A (ρ, C), B (N, ρ) and ranks (K,).

    Args:
        A_blocks: K tensors A_k (r_k, C_k), columns as `partition.cols(k)` lists them.
        B_blocks: K tensors B_k (N_k, r_k), rows as `partition.rows(k)` lists them.
        partition: the blocks.

    Raises:
        ValueError: a factor whose shape does not fit its block.
    """
    if not len(A_blocks) == len(B_blocks) == partition.num_blocks:
        raise ValueError(
            f"A_blocks and B_blocks must hold one factor for each of {partition.num_blocks} blocks, "
            f"got {len(A_blocks)} and {len(B_blocks)}"
        )
    ranks = [A.shape[0] for A in A_blocks]
    A = A_blocks[0].new_zeros(max(ranks), partition.shape[1])
    B = B_blocks[0].new_zeros(partition.shape[0], max(ranks))
    for k, (A_k, B_k, r) in enumerate(zip(A_blocks, B_blocks, ranks, strict=True)):
        if A_k.shape != (r, partition.col_sizes[k]) or B_k.shape != (partition.row_sizes[k], r):
            raise ValueError(
                f"block {k} takes factors of shapes (r, {partition.col_sizes[k]}) and ({partition.row_sizes[k]}, r), "
                f"got {tuple(A_k.shape)} and {tuple(B_k.shape)}"
            )
        A[:r, partition.cols(k)] = A_k
        B[partition.rows(k), :r] = B_k
    return A, B, torch.tensor(ranks, dtype=torch.int32, device=A.device)


def unpack_factors(
    A: Tensor, B: Tensor, partition: BlockPartition, ranks: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Inverse of :func:`pack_factors`: lists of A_k (r_k, C_k) and B_k (N_k, r_k), padding left out."""
    sizes = ranks.tolist()
    return (
        [A[:r, partition.cols(k)] for k, r in enumerate(sizes)],
        [B[partition.rows(k), :r] for k, r in enumerate(sizes)],
    )
