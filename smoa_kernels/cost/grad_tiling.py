"""How `block_grad` cuts its work: parts of the tokens, tiles of G, splits among programs, and the partials they leave.

The backend launches by these numbers, and what is predicted (`counts.py`, `workspace.py`, `grad_share.py`) counts by
the same.
"""

from __future__ import annotations

import math

from ..checks import MOST_SIZE, check_count, check_kind
from .problem import Problem

__all__ = ["grad_tiles", "gradient_parts", "partial_bytes", "partial_width", "token_splits"]

PARTIAL_RANKS = 4  # partials are padded to a multiple of so many ranks: 128 bits of float32
GRAD_TILE = 128  # one rank-sized partial is written per tile of so many rows or columns
GRAD_STEP = 64  # tokens of one step of the main loop
GRAD_EPILOGUE_STEPS = 8  # what the end of a program costs, in steps: an assumption (`grad_share.py`)
# Fewest tokens that the backward gathers at a time, if not all: in a loop of 64 steps a program's end takes a ninth.
GRAD_PART_TOKENS = 64 * GRAD_STEP
GRAD_PART_TILES = 128  # and fewest tiles of G: about a large GPU's multiprocessors, which each launch fills


def partial_width(rank: int) -> int:
    """R, the ranks that a row of block_grad's partials holds: ρ rounded up to whole stores of 128 bits.

    Args:
        rank: ρ.

    Raises:
        TypeError, ValueError: it is none.

    Example:
        >>> partial_width(4), partial_width(5)
        (4, 8)
    """
    check_count("rank", rank, 0, MOST_SIZE)
    return math.ceil(rank / PARTIAL_RANKS) * PARTIAL_RANKS


def partial_bytes(p: Problem) -> int:
    """float32 partials of dA and dB: one (R, tile) slice per tile of the other side, within each block.

    R is :func:`partial_width`. Every one of :func:`gradient_parts` writes its own. A problem with fewer tiles than a
    GPU has multiprocessors splits its tokens among programs too and writes that many times more, of a size that is
    small then.

    Args:
        p: the problem.

    Raises:
        TypeError: it is none.

    Example:
        >>> partial_bytes(Problem(8192, 14336, 4096, num_blocks=4, rank=16)) / 2**20  # two parts of 3.5 MiB
        7.0
    """
    return len(gradient_parts(p)) * _partial_bytes_of_one(p)


def _partial_bytes_of_one(p: Problem) -> int:
    rows, cols = (p.padded(n) // p.num_blocks for n in (p.out_features, p.in_features))
    slices = p.out_features * math.ceil(cols / GRAD_TILE) + p.in_features * math.ceil(rows / GRAD_TILE)
    return 4 * partial_width(p.max_rank) * slices


def gradient_parts(p: Problem) -> tuple[int, ...]:
    """How many tokens the backward gathers at a time for dA and dB, which are sums over tokens: all, or parts in turn.

    In so many parts that the gathered copies of dY and x take no more memory than dX and its W_eff do afterwards, but
    no more than their own partials are worth (n parts hold 1/n of the copies, and n times the partials of one), of no
    fewer tokens than `GRAD_PART_TOKENS`, for each part runs the end of every program anew, and only where G has
    `GRAD_PART_TILES`. Under dropout dX comes with gathered copies of its own, and there is nothing to save.

    Args:
        p: the problem.

    Raises:
        TypeError: it is none.

    Example:
        >>> gradient_parts(Problem(8192, 4096, 4096, num_blocks=4, rank=16))
        (4096, 4096)
        >>> gradient_parts(Problem(8192, 4096, 14336, num_blocks=4, rank=16))  # dX alone is 224 MiB
        (8192,)
    """
    check_kind("p", p, Problem)
    most = p.tokens // GRAD_PART_TOKENS
    if most < 2 or p.dropout or grad_tiles(p) < GRAD_PART_TILES:
        return (p.tokens,)
    copies = p.tokens * sum(p.padded(n) for n in (p.out_features, p.in_features) if p.gathers(n))
    wanted = math.ceil(copies / (p.weight_elements + p.tokens * p.in_features))
    # Where c / n + n q is least.
    worth = math.isqrt(copies * p.dtype.itemsize // max(1, _partial_bytes_of_one(p)))
    # Whole steps, so that only the last part has one that is not full.
    each = math.ceil(p.tokens / max(1, min(wanted, most, worth)) / GRAD_STEP) * GRAD_STEP
    whole, rest = divmod(p.tokens, each)
    return (each,) * whole + ((rest,) if rest else ())


def grad_tiles(p: Problem) -> int:
    """Tiles of G of all blocks: programs of a launch of block_grad that need not share them.

    Args:
        p: the problem.

    Raises:
        TypeError: no problem.

    Example:
        >>> grad_tiles(Problem(8192, 4096, 4096, num_blocks=4, rank=16))
        256
    """
    check_kind("p", p, Problem)
    rows, cols = (p.padded(n) // p.num_blocks for n in (p.out_features, p.in_features))
    return p.num_blocks * math.ceil(rows / GRAD_TILE) * math.ceil(cols / GRAD_TILE)


def token_splits(tokens: int, programs: int, processors: int, block_t: int) -> int:
    """Into how many parts block_grad cuts T so that it fills a GPU: one where the tiles of G do already.

    A part keeps at least as many steps of the main loop as a program's end costs.

    Args:
        tokens: T.
        programs: tiles of G, of all blocks.
        processors: multiprocessors of the GPU.
        block_t: tokens of a step.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Example:
        >>> token_splits(8192, 32, 132, 64)  # 160 programs
        5
    """
    check_count("tokens", tokens, 0, MOST_SIZE)
    for name, value in {"programs": programs, "processors": processors, "block_t": block_t}.items():
        check_count(name, value, 1, MOST_SIZE)
    return max(1, min(-(-processors // programs), tokens // (GRAD_EPILOGUE_STEPS * block_t)))
