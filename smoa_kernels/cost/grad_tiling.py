"""How `block_grad` divides its work: parts of the tokens, tiles of G, splits of a part, and the partials they write.

The triton backend launches by these numbers, and the predictions (`counts.py`, `workspace.py`) count by them.
"""

from __future__ import annotations

import math

from .problem import Problem

__all__ = ["grad_tiles", "gradient_parts", "partial_bytes", "partial_width", "token_splits"]

PARTIAL_RANKS = 4  # partials are padded to a multiple of this many ranks: 128 bits of float32
GRAD_TILE = 128  # one rank-sized partial is written for each tile of this many rows or columns
GRAD_STEP = 64  # tokens in one step of the main loop
GRAD_EPILOGUE_STEPS = 11  # what the end of a program costs, in steps of its main loop: an assumption
# The backward gathers all tokens at once, or at least this many: a program's end then takes a ninth of its time.
GRAD_PART_TOKENS = 64 * GRAD_STEP
GRAD_PART_TILES = (
    128  # fewest tiles of G for that: as many as a large GPU has multiprocessors, so each launch fills it
)


def partial_width(rank: int) -> int:
    """R, the width of block_grad's partials: the rank ρ rounded up to whole stores of 128 bits."""
    return math.ceil(rank / PARTIAL_RANKS) * PARTIAL_RANKS


def partial_bytes(p: Problem) -> int:
    """Bytes of the float32 partials of dA and dB.

    Within each block there is one slice of (R, tile) for each tile of the other side; R is :func:`partial_width`.
    Each of :func:`gradient_parts` writes its own partials. Not counted: a problem with fewer tiles than the GPU has
    multiprocessors also splits its tokens among programs, and each split writes partials. They are small then.
    """
    return len(gradient_parts(p)) * _partial_bytes_of_one(p)


def _partial_bytes_of_one(p: Problem) -> int:
    rows, cols = (p.padded(n) // p.num_blocks for n in (p.out_features, p.in_features))
    slices = p.out_features * math.ceil(cols / GRAD_TILE) + p.in_features * math.ceil(rows / GRAD_TILE)
    return 4 * partial_width(p.max_rank) * slices


def gradient_parts(p: Problem) -> tuple[int, ...]:
    """How many tokens the backward gathers at a time for dA and dB: all of them, or several parts in turn.

    dA and dB are sums over tokens, so they can be summed part by part, and the gathered copies of dY and x then take
    less memory. There are as many parts as it takes for the copies to need no more memory than dX and its W_eff do
    afterwards, within three limits. n parts hold 1/n of the copies but n times the partials of one, so n stays where
    the sum still falls. A part has at least `GRAD_PART_TOKENS`, since each part runs the end of every program again.
    And G has at least `GRAD_PART_TILES`. Under dropout dX needs copies of its own: one part. Where kernels read dY and
    x in place nothing is gathered: one part.

    Example:
        >>> gradient_parts(Problem(8192, 4096, 4096, num_blocks=4, rank=16))
        (4096, 4096)
        >>> gradient_parts(Problem(8192, 4096, 14336, num_blocks=4, rank=16))  # dX alone is 224 MiB
        (8192,)
    """
    most = p.tokens // GRAD_PART_TOKENS
    if most < 2 or p.dropout or grad_tiles(p) < GRAD_PART_TILES:
        return (p.tokens,)
    copies = p.tokens * sum(p.padded(n) for n in (p.out_features, p.in_features) if p.gathers(n))
    wanted = math.ceil(copies / (p.weight_elements + p.tokens * p.in_features))
    # The n at which copies / n + n · partials is least.
    worth = math.isqrt(copies * p.dtype.itemsize // max(1, _partial_bytes_of_one(p)))
    # Whole steps, so that only the last part can end in a step that is not full.
    each = math.ceil(p.tokens / max(1, min(wanted, most, worth)) / GRAD_STEP) * GRAD_STEP
    whole, rest = divmod(p.tokens, each)
    return (each,) * whole + ((rest,) if rest else ())


def grad_tiles(p: Problem) -> int:
    """Tiles of G in all blocks: the programs of a launch of block_grad where each tile has one."""
    rows, cols = (p.padded(n) // p.num_blocks for n in (p.out_features, p.in_features))
    return p.num_blocks * math.ceil(rows / GRAD_TILE) * math.ceil(cols / GRAD_TILE)


def token_splits(tokens: int, programs: int, processors: int, block_t: int) -> int:
    """Among how many programs block_grad splits the tokens of a tile so that it fills a GPU; 1 where the tiles do.

    A split keeps at least as many steps of the main loop as a program's end costs.

    Args:
        tokens: T.
        programs: tiles of G in all blocks.
        processors: multiprocessors of the GPU.
        block_t: tokens in a step.

    Example:
        >>> token_splits(8192, 32, 132, 64)  # 160 programs
        5
    """
    return max(1, min(-(-processors // programs), tokens // (GRAD_EPILOGUE_STEPS * block_t)))
