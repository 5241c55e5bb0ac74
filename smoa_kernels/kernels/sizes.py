"""The sizes that launches agree on: granules, buckets of tokens, padded blocks, and how `block_grad` divides its work.

Nothing here needs Triton: the predictions (`tuning/roofline.py`) count by the same sizes.
"""

from __future__ import annotations

import functools
import math

__all__ = [
    "GRANULE",
    "PARTIAL_RANKS",
    "bucket",
    "gradient_parts",
    "padded",
    "padding_multiple",
    "partial_bytes",
    "partial_width",
    "token_splits",
]

GRANULE = 8
"""Adjacent coordinates that kernels read and write as one: 16 bytes of half types."""

# In the padded block-major layout each block's width is a multiple of the wide padding, which every shipped tile
# divides, or of the narrow one where no block is wider than that.
WIDE_PADDING, NARROW_PADDING = 128, 64

PARTIAL_RANKS = 4  # partials are padded to a multiple of this many ranks: 128 bits of float32
GRAD_TILE = 128  # one rank-sized partial is written for each tile of this many rows or columns
GRAD_STEP = 64  # tokens in one step of the main loop
GRAD_EPILOGUE_STEPS = 11  # what the end of a program costs, in steps of its main loop: an assumption
# The backward gathers all tokens at once, or at least this many: a program's end then takes a ninth of its time.
GRAD_PART_TOKENS = 64 * GRAD_STEP
# Fewest tiles of G for that: as many as a large GPU has multiprocessors, so that each launch fills it.
GRAD_PART_TILES = 128


def bucket(tokens: int) -> int:
    """The next power of two: one choice serves 2049 to 4096 tokens, and was made for 4096."""
    return 1 << max(tokens - 1, 0).bit_length()


@functools.cache  # asked at every call of a layer
def padding_multiple(sizes: tuple[int, ...]) -> int:
    """The number to whose multiples blocks of these sizes are padded."""
    return WIDE_PADDING if max(sizes) > NARROW_PADDING else NARROW_PADDING


def padded(features: int, num_blocks: int) -> int:
    """Width of the padded block-major layout of N or C coordinates that are cut evenly."""
    widest = math.ceil(features / num_blocks)
    multiple = padding_multiple((widest,))
    return num_blocks * math.ceil(widest / multiple) * multiple


def partial_width(rank: int) -> int:
    """R, the width of block_grad's partials: the rank ρ rounded up to whole stores of 128 bits."""
    return math.ceil(rank / PARTIAL_RANKS) * PARTIAL_RANKS


def partial_bytes(features: tuple[int, int], num_blocks: int, rank: int) -> int:
    """Bytes of the float32 partials of dA and dB that one launch of block_grad writes.

    Within each block there is one slice of (R, tile) for each tile of the other side; R is :func:`partial_width`. Not
    counted: a problem with fewer tiles than the GPU has multiprocessors also splits its tokens among programs, and each
    split writes partials. They are small then.

    Args:
        features: N and C.
        num_blocks: K.
        rank: ρ.
    """
    N, C = features
    row_tiles, col_tiles = (math.ceil(padded(n, num_blocks) / num_blocks / GRAD_TILE) for n in features)
    return 4 * partial_width(rank) * (N * col_tiles + C * row_tiles)


def gradient_parts(
    tokens: int, features: tuple[int, int], num_blocks: int, rank: int, itemsize: int
) -> tuple[int, ...]:
    """How many tokens the backward gathers at a time for dA and dB: all of them, or several parts in turn.

    dA and dB are sums over tokens, so they can be summed part by part, and the gathered copies of dY and x then take
    less memory. There are as many parts as it takes for the copies to need no more memory than dX and its W_eff do
    afterwards, within three limits. n parts hold 1/n of the copies but n times the partials of one, so n stays where
    the sum still falls. A part has at least `GRAD_PART_TOKENS`, since each part runs the end of every program again.
    And G has at least `GRAD_PART_TILES`.

    Args:
        tokens: T.
        features: N and C.
        num_blocks: K.
        rank: ρ.
        itemsize: bytes of an element of x and dY.

    Example:
        >>> gradient_parts(8192, (4096, 4096), num_blocks=4, rank=4, itemsize=2)
        (4096, 4096)
        >>> gradient_parts(8192, (4096, 14336), num_blocks=4, rank=4, itemsize=2)  # dX alone is 224 MiB
        (8192,)
    """
    N, C = features
    widths = [padded(n, num_blocks) for n in features]
    tiles = num_blocks * math.prod(math.ceil(width / num_blocks / GRAD_TILE) for width in widths)
    most = tokens // GRAD_PART_TOKENS
    if most < 2 or tiles < GRAD_PART_TILES:
        return (tokens,)
    copies = tokens * sum(widths)
    wanted = math.ceil(copies / (N * C + tokens * C))
    # The n at which copies / n + n · partials is least.
    worth = math.isqrt(copies * itemsize // max(1, partial_bytes(features, num_blocks, rank)))
    # Whole steps, so that only the last part can end in a step that is not full.
    each = math.ceil(tokens / max(1, min(wanted, most, worth)) / GRAD_STEP) * GRAD_STEP
    whole, rest = divmod(tokens, each)
    return (each,) * whole + ((rest,) if rest else ())


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
