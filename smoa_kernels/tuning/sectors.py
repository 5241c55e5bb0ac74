"""What scattered coordinates cost: memory and caches move whole sectors of 32 bytes.

A block's granules, runs of g adjacent coordinates, lie among the others' as if drawn at random, each with probability
1/K. A sector of m elements overlaps with n of them, so a block touches the share `1 - (1 - 1/K)^n` of a row's sectors.
Where sectors cut granules, they cut at multiples of d, the greatest common divisor of g and m. Two runs of d
coordinates that follow each other in a block therefore lie in different sectors with probability `K·d/m` times that
share. For single coordinates (g = 1) n is m and d is 1. Granules of whole sectors waste nothing, nor do contiguous
blocks, whose g is their size; a granule of 8 in 16 bits is half a sector.

How often a sector is fetched depends on who else wants it while a cache holds it:

- **Memory moves x, dY and y once, as if they were contiguous.** Their rows belong to all blocks, and programs of all
  blocks run side by side on the same tokens. Between them they use, or complete, a sector while the L2 cache holds it.
- **Memory moves of W0 what the blocks touch** (:func:`touched`): a row of W0 belongs to one block, and nobody else
  wants the rest of its sectors. For single coordinates that is almost all of W0, although the blocks are 1/K of it.
- **Memory moves x and dY for each block anew where `block_grad` reads them in place**: it takes one block after the
  other, and all tokens of one are more than a cache holds.
- **The L2 cache** moves a program's sectors for it alone (:func:`overfetch`): a gather's once for each row of its
  tile, since L1 keeps them between its loads, and a product's, which reads in place, once for each row of a step's
  tile; a scattered store's, or a single load's, once for each warp; a store's of whole vectors for each row of a tile.

Not modelled: how many lines of L1 a warp's request looks up, which a bad layout makes the slowest of all; memory that
fetches two sectors where one is missing.
"""

from __future__ import annotations

import math

__all__ = ["GATHER_TILE", "STEP", "WARP", "overfetch", "touched"]

SECTOR = 32  # bytes
WARP = 32  # elements of a row that a warp reads or writes at a time
GATHER_TILE = 128  # columns in a tile of `permute`
STEP = 64  # columns in a step of `block_matmul` in half types


def touched(blocks: int, itemsize: int, granule: int = 1) -> float:
    """Share of a row's sectors that hold a coordinate of one block.

    Example:
        >>> [round(touched(blocks, 2), 3) for blocks in (1, 4, 8)]
        [1.0, 0.99, 0.882]
        >>> [round(touched(blocks, 2, granule=8), 3) for blocks in (1, 4, 8)]
        [1.0, 0.438, 0.234]
    """
    elements = SECTOR // itemsize
    # A sector overlaps with `least` granules, and `more` of every `granule` sectors with one granule more.
    least, more = divmod(granule + elements - math.gcd(granule, elements), granule)
    return float(1 - (1 - 1 / blocks) ** least * (1 - more / granule / blocks))


def overfetch(together: int, blocks: int, itemsize: int, granule: int = 1) -> float:
    """Bytes moved over bytes used where `together` neighbours of a block share their sectors; 1 for K = 1.

    `together` is a sector or more.

    Example:
        >>> [round(overfetch(GATHER_TILE, blocks, 2), 2) for blocks in (1, 4, 8)]
        [1.0, 4.05, 7.13]
        >>> [round(overfetch(GATHER_TILE, blocks, 2, granule=8), 2) for blocks in (1, 4, 8)]
        [1.0, 1.77, 1.88]
    """
    if blocks == 1:
        return 1.0
    elements = SECTOR // itemsize
    run = math.gcd(granule, elements)
    sectors = 1 + (together / run - 1) * touched(blocks, itemsize, granule) * blocks * run / elements
    return sectors * elements / together
