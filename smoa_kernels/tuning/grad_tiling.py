"""What the predictions know of how `block_grad` divides a problem."""

from __future__ import annotations

import math

from ..kernels import sizes
from ..kernels.sizes import GRAD_TILE
from .problem import Problem

__all__ = ["grad_tiles", "gradient_parts", "partial_bytes"]


def partial_bytes(p: Problem) -> int:
    """Bytes of the float32 partials of dA and dB: each of :func:`gradient_parts` writes its own."""
    features = p.out_features, p.in_features
    return len(gradient_parts(p)) * sizes.partial_bytes(features, p.num_blocks, p.max_rank)


def gradient_parts(p: Problem) -> tuple[int, ...]:
    """:func:`sizes.gradient_parts`: one part under dropout, and where kernels read dY and x in place."""
    features = p.out_features, p.in_features
    if p.dropout or not any(p.gathers(n) for n in features):
        return (p.tokens,)
    return sizes.gradient_parts(p.tokens, features, p.num_blocks, p.max_rank, p.dtype.itemsize)


def grad_tiles(p: Problem) -> int:
    """Tiles of G in all blocks: the programs of a launch of block_grad where each tile has one."""
    rows, cols = (p.padded(n) // p.num_blocks for n in (p.out_features, p.in_features))
    return p.num_blocks * math.ceil(rows / GRAD_TILE) * math.ceil(cols / GRAD_TILE)
