"""A layer's rank budget r, shared by its blocks, and its number of parameters."""

from __future__ import annotations

from collections.abc import Sequence

from ..checks import MOST_RANKS, check_blocks, check_count, shown
from .partition import BlockPartition


def resolve_ranks(r: int, num_blocks: int, block_ranks: Sequence[int] | None = None) -> tuple[int, ...]:
    """Return the rank of each block: `block_ranks` after checking it, or where it is None `r // K + (k < r % K)`."""
    check_count("r", r, most=MOST_RANKS)
    check_blocks(num_blocks)
    if block_ranks is None:
        return tuple(r // num_blocks + (k < r % num_blocks) for k in range(num_blocks))
    if not isinstance(block_ranks, Sequence):
        raise TypeError(f"block_ranks must be a list of ints, got {shown(block_ranks)}")
    ranks = tuple(block_ranks)
    if any(isinstance(rank, bool) or not isinstance(rank, int) for rank in ranks):
        raise TypeError(f"block_ranks must be ints, got {shown(list(ranks))}")
    if len(ranks) != num_blocks:
        raise ValueError(
            f"block_ranks must have num_blocks={num_blocks} entries, got {len(ranks)}: {shown(list(ranks))}"
        )
    if min(ranks) < 0:
        raise ValueError(f"block_ranks must not be negative, got {shown(list(ranks))}")
    if sum(ranks) != r:
        raise ValueError(
            f"block_ranks must sum to r={r}, got {shown(list(ranks))}, which sum to {sum(ranks)}"
        )
    return ranks


def trainable_parameters(partition: BlockPartition, ranks: Sequence[int]) -> int:
    """Count an adapter's trainable parameters, `Σ r_k (N_k + C_k)`; padding is not counted."""
    sizes = zip(ranks, partition.row_sizes, partition.col_sizes, strict=True)
    return sum(r * (rows + cols) for r, rows, cols in sizes)
