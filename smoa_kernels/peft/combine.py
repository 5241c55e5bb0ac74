"""Several adapters over one weight as one, exactly.

`Σ_i ΔW_i` is an adapter itself: where the partitions agree its factors are the concatenated ones; where they do
not, it is one of a single block (HiRA) whose factors are zero outside the blocks that they came from. The layer
therefore multiplies by W0 once, however many adapters are active.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..packed import PackedAdapter, padding_masks
from ..partition import BlockPartition

__all__ = ["sum_adapters"]


def sum_adapters(parts: Sequence[PackedAdapter], whole: BlockPartition | None = None) -> PackedAdapter:
    """The adapter whose ΔW is the sum of `parts`'; differentiable in their factors.

    Args:
        parts: adapters over one weight, at least one. Partitions that agree are one object.
        whole: the partition of a single block, where it is at hand.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    dtype = first.A.dtype
    for part in parts:
        dtype = torch.promote_types(dtype, part.A.dtype)
    device = first.weight.device
    if all(part.partition is first.partition for part in parts):
        partition = first.partition
        factors = [_masked(part) for part in parts]
    else:
        partition = single_block(first.weight) if whole is None else whole
        factors = [part.expanded_factors(torch.promote_types(dtype, torch.float32)) for part in parts]
    A = torch.cat([A.to(dtype) for A, _ in factors])
    B = torch.cat([B.to(dtype) for _, B in factors], 1)
    # Padding became zeros, which add nothing: every block may count it as rank.
    ranks = torch.full((partition.num_blocks,), A.shape[0], dtype=torch.int32, device=device)
    return PackedAdapter(first.weight, A, B, partition, ranks, torch.ones_like(first.scaling))


def single_block(weight: Tensor) -> BlockPartition:
    """The partition of K = 1: every coordinate in block 0."""
    rows, cols = (torch.zeros(size, dtype=torch.uint8, device=weight.device) for size in weight.shape)
    return BlockPartition.from_labels(rows, cols, 1)


def _masked(part: PackedAdapter) -> tuple[Tensor, Tensor]:
    """Factors with zeros for padding and s folded into B."""
    A_mask, B_mask = padding_masks(part.partition, part.ranks, part.A.shape[0])
    return part.A * A_mask, part.B * B_mask * part.scaling.to(part.B.dtype)
