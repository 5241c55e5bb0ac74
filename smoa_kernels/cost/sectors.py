"""What scattered coordinates cost: memory and caches move whole sectors of 32 bytes.

A block's coordinates lie among the others' as if drawn at random, each coordinate with probability 1/K. Two that follow
each other in a block are a geometric gap apart, so they lie in different sectors of m elements with probability
`K/m · (1 - (1 - 1/K)^m)`. The last factor is the share of a row's sectors that the block touches at all.

How often a sector is fetched depends on who else wants it while a cache holds it:

- **Memory moves x, dY and y once, as if they were contiguous.** Their rows belong to all blocks, and programs of all
  blocks run side by side on the same tokens. Between them they use, or complete, a sector while the L2 cache holds it.
- **Memory moves W0 almost whole** (:func:`touched`), although the blocks are 1/K of it: a row of W0 belongs to one
  block, and nobody else wants the rest of its sectors.
- **The L2 cache** moves a program's sectors for it alone (:func:`overfetch`): a gather's once for each row of its
  tile, since L1 keeps them between its loads; a scattered store's, or a single load's, once for each warp.

Not modelled: how many lines of L1 a warp's request looks up, which a bad layout makes the slowest of all.
"""

from __future__ import annotations

__all__ = ["GATHER_TILE", "WARP", "overfetch", "touched"]

SECTOR = 32  # bytes
WARP = 32  # elements of a row that a warp reads or writes at a time
GATHER_TILE = 128  # columns in a tile of `permute`


def touched(blocks: int, itemsize: int) -> float:
    """Share of a row's sectors that hold a coordinate of one block.

    Example:
        >>> [round(touched(blocks, 2), 3) for blocks in (1, 4, 8)]
        [1.0, 0.99, 0.882]
    """
    return float(1 - (1 - 1 / blocks) ** (SECTOR // itemsize))


def overfetch(together: int, blocks: int, itemsize: int) -> float:
    """Bytes moved over bytes used where `together` neighbours of a block share their sectors; 1 for K = 1.

    Example:
        >>> [round(overfetch(GATHER_TILE, blocks, 2), 2) for blocks in (1, 4, 8)]
        [1.0, 4.05, 7.13]
    """
    if blocks == 1:
        return 1.0
    elements = SECTOR // itemsize
    sectors = 1 + (together - 1) * touched(blocks, itemsize) * blocks / elements
    return sectors * elements / together
