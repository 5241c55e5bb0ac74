"""The packed form of an adapter: one A (ρ, C) and one B (N, ρ) in the layer's own coordinates.

    W_eff[i, j] = W0[i, j] · (1 + s · [b(i) = c(j)] · Σ_t B[i, t] A[t, j])     (docs/definition.md)

Column j of A holds its block's A_k, so ρ = max r_k and rows t ≥ r_k are padding: they never reach an output,
their gradient is zero, and they are never counted as parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast

import torch
from torch import Tensor

from .labels import of_groups
from .partition import BlockPartition
from .thresholds import ORIGIN, Place


@dataclass(slots=True, eq=False)  # not frozen: that takes three times as long, twice per call of a layer
class PackedAdapter:
    """Everything that defines W_eff: W0, the factors, the partition and the scaling. Nobody changes any of it.

    Attributes:
        weight: W0 (N, C), any strides.
        A: (ρ, C).
        B: (N, ρ).
        partition: blocks of W0's rows and columns.
        ranks: int32 (K,) rank r_k of each block.
        scaling: 0-d tensor, s.
        block_ranks: the numbers in `ranks`, where the host has them.
        place: of W0 in the whole weight; a half-precision W_eff is rounded by it.
        layout: a backend's cached form of these tensors for its calls (`kernels.launch.Operands`, `Call`), or
            None. It holds while the tensors keep their memory, dtype and strides, and s its value.
    """

    weight: Tensor
    A: Tensor
    B: Tensor
    partition: BlockPartition
    ranks: Tensor
    scaling: Tensor
    block_ranks: Sequence[int] | None = None
    place: Place = ORIGIN
    layout: Any = field(default=None, init=False, repr=False)

    @property
    def T(self) -> PackedAdapter:
        """The adapter of W_effᵀ: with rows and columns swapped the same formula holds.

        So code that computes `x W_effᵀ` also computes `dX = dY W_eff`.
        """
        rest = self.partition.T, self.ranks, self.scaling, self.block_ranks, self.place.T
        return PackedAdapter(self.weight.T, self.B.T, self.A.T, *rest)

    def is_of(self, weight: Tensor, A: Tensor, B: Tensor, ranks: Tensor, scaling: Tensor) -> bool:
        """Whether these very tensors are the adapter's."""
        factors = A is self.A and B is self.B
        return factors and weight is self.weight and ranks is self.ranks and scaling is self.scaling

    def __reduce__(self) -> tuple[Any, ...]:  # a backend's form is of this object and process
        return PackedAdapter, tuple(getattr(self, part.name) for part in fields(self) if part.init)

    def host_ranks(self) -> Sequence[int]:
        """The ranks as numbers, clamped to 0 and ρ. Waits for the GPU if only the GPU has them."""
        if self.block_ranks is not None:
            return self.block_ranks
        return cast("list[int]", self.ranks.clamp(0, self.A.shape[0]).tolist())

    def expanded_factors(self, dtype: torch.dtype, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Zero-padded factors: Ã (r, C) and B̃ (N, r), r = Σ r_k, with s·B̃ Ã = s·mask·(BA).

        One slot per (block, rank): slot (k, t) of Ã is A's row t on the columns of block k, zero elsewhere.
        s is folded into B̃, which is rounded to `dtype` after that. Where B holds
        some `rows` (T,) alone, B̃ is (T, r).
        """
        p, ranks, rho = self.partition, self.host_ranks(), self.A.shape[0]
        wide = torch.promote_types(dtype, torch.float32)
        A, B = self.A.to(wide), self.B.to(wide) * self.scaling
        row_block = p.row_block if rows is None else p.row_block[rows]
        if p.num_blocks > 1:  # ρ slots for each block
            # Scattered, not multiplied by a mask: padding may hold anything, and 0 · NaN is NaN.
            cols = p.col_block.long().expand(1, rho, -1)
            slots = row_block.long()[:, None, None].expand(-1, 1, rho)
            A = A.new_zeros(p.num_blocks, *A.shape).scatter_(0, cols, A[None]).flatten(0, 1)
            B = B.new_zeros(B.shape[0], p.num_blocks, rho).scatter_(1, slots, B[:, None]).flatten(1)
        if min(ranks) < rho:
            # Slot i of the sum of ranks is rank i - (ends - ranks)[k] of block k; computed on the ranks' device.
            sizes = self.ranks.clamp(0, rho)
            ends = sizes.cumsum(0)
            slot = torch.arange(sum(ranks), device=A.device)
            block = torch.bucketize(slot, ends, right=True)
            kept = block * rho + slot - (ends - sizes)[block]
            A, B = A.index_select(0, kept), B.index_select(1, kept)
        return A.to(dtype), B.to(dtype)


def scaling_tensor(value: float | Tensor, device: torch.device) -> Tensor:
    """s as a 0-d tensor on `device`; a number becomes float64, which promotes nothing and rounds nothing."""
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device)  # a small layer feels each call
    return torch.full(
        (), value, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device
    )


def padding_masks(partition: BlockPartition, ranks: Tensor, rho: int) -> tuple[Tensor, Tensor]:
    """Bool masks of A (ρ, C) and B (N, ρ): True where an entry is a parameter, False where it is padding."""
    slot = torch.arange(rho, device=ranks.device)
    return slot[:, None] < ranks[partition.col_block.long()], slot < ranks[partition.row_block.long(), None]


@torch.no_grad()
def draw_A(
    A: Tensor,
    partition: BlockPartition,
    ranks: Tensor,
    group_size: int = 1,
    col_group: Tensor | None = None,
) -> None:
    """Fill A (ρ, C / group_size) with A_k uniform in ±1/√C_k (Kaiming, a=√5), zeros in its padding."""
    widths = torch.tensor(partition.col_sizes, dtype=A.dtype, device=A.device)
    bound = widths.clamp_min(1).rsqrt()[partition.col_block.long()]
    A_mask, _ = padding_masks(partition, ranks, A.shape[0])
    A.uniform_(-1, 1).mul_(of_groups(bound * A_mask, group_size, col_group))
