"""A layer's rank budget r, shared by its blocks, its number of parameters, and its alpha at LoRA's learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..checks import MOST_RANKS, check_blocks, check_count, granules, shown
from .partition import BlockPartition

# Fitted; theory gives the powers of K and of W0's size.
_KAPPA = 3.0


def resolve_ranks(r: int, num_blocks: int, block_ranks: Sequence[int] | None = None) -> tuple[int, ...]:
    """Return the rank of each block: `block_ranks` after checking it, or where it is None `r // K + (k < r % K)`."""
    check_count("r", r, most=MOST_RANKS)
    check_blocks(num_blocks)
    if block_ranks is None:
        return tuple(r // num_blocks + (k < r % num_blocks) for k in range(num_blocks))
    is_list = isinstance(block_ranks, Sequence)
    if not is_list or any(isinstance(rank, bool) or not isinstance(rank, int) for rank in block_ranks):
        raise TypeError(f"block_ranks must be a list of ints, got {shown(block_ranks)}")
    ranks = tuple(block_ranks)
    if len(ranks) != num_blocks or min(ranks) < 0 or sum(ranks) != r:
        raise ValueError(
            f"block_ranks must be num_blocks={num_blocks} numbers of 0 or more that sum to r={r}, got {len(ranks)} "
            f"that sum to {sum(ranks)}: {shown(list(ranks))}"
        )
    return ranks


def trainable_parameters(partition: BlockPartition, ranks: Sequence[int], group_size: int = 1) -> int:
    """Count an adapter's trainable parameters, `Σ r_k (N_k + C_k / group_size)`; padding is not counted."""
    sizes = zip(ranks, partition.row_sizes, partition.col_sizes, strict=True)
    return sum(r * (rows + granules(cols, group_size)) for r, rows, cols in sizes)


def alpha_for_lora_rate(alpha: float, num_blocks: int, sketch: Tensor, elements: int) -> float:
    """Return the alpha of a layer at LoRA's learning rate, `alpha · 3 K / rms(W0)` (docs/internals/learning_rate.md).

    Args:
        alpha: LoRA's alpha.
        num_blocks: K.
        sketch: that of W0, float32 (33,), or of each matrix of a stack (E, 33): it holds the norm.
        elements: how many elements each matrix has.
    """
    if sketch.is_meta:
        raise ValueError("use_lora_rate reads the base weight, which is on the meta device: load it first")
    rms = float(sketch[..., -1].double().mul(2).exp2().mean().div(elements).sqrt())
    # The sketch of zero holds the smallest normal float32 for a norm.
    if not 1e-30 < rms < math.inf:
        raise ValueError("use_lora_rate needs a base weight that is finite and not zero")
    return alpha * _KAPPA * num_blocks / rms
