"""The rate of `block_grad`, predicted as a share of the rate of a large GEMM on the same GPU.

    share = tiles · waves · main loop · cache

The parts that `cost.py` adds up take the GEMM's rate for every product, ours and the peers' alike. This is what is to
be expected of the one product that no BLAS library computes for us, at `block_grad`'s largest tile.

Assumed, until a GPU has measured it: the end of a program costs as much as `GRAD_EPILOGUE_STEPS` steps of its main
loop, a multiprocessor runs one program at a time, and the last cache delivers `CACHE_OVER_MEMORY` times what the memory
does. Not modelled: how a program's pipeline fills and drains, in which order tiles meet in the cache, a clock that
falls under load. Instruction slots and shared memory are not the limit: docs/gpu.md has what the compiled loop takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..checks import check_count, check_kind
from .gpus import Gpu
from .grad_tiling import (
    GRAD_EPILOGUE_STEPS,
    GRAD_STEP,
    GRAD_TILE,
    grad_tiles,
    gradient_parts,
    token_splits,
)
from .problem import Problem

__all__ = ["GradShare", "block_grad_share"]

# Published: 7.2 over 2.04 TB/s for an A100's L2, 17.2 over 5.3 for an MI300X's last cache. Of others nobody says.
CACHE_OVER_MEMORY = 3.0


@dataclass(frozen=True)
class GradShare:
    """What each limit leaves of a large GEMM's rate.

    Attributes:
        tiles: the part of the products that is no padding, of blocks or of the last step of tokens.
        waves: the part of the multiprocessors' time in which they have a program: the last wave is not full.
        main_loop: the part of a program's time before its end, where it gathers W0, contracts and stores.
        cache: how much of the rate the last cache can feed with operands.

    Example:
        >>> round(GradShare(tiles=1.0, waves=0.9, main_loop=0.8, cache=1.0).share, 2)
        0.72
    """

    tiles: float
    waves: float
    main_loop: float
    cache: float

    @property
    def share(self) -> float:
        """All of them together."""
        return self.tiles * self.waves * self.main_loop * self.cache


def block_grad_share(problem: Problem, gpu: Gpu, *, ieee: bool = True) -> GradShare:
    """Predict the share, of the products of G that count.

    Args:
        problem: the layer and the batch.
        gpu: as in :func:`smoa_kernels.cost.estimate.estimate`.
        ieee: likewise.

    Raises:
        TypeError: a problem or GPU that is none.
        ValueError: no tokens.

    Example:
        >>> from smoa_kernels.cost.gpus import GPUS
        >>> found = block_grad_share(Problem(8192, 4096, 4096, num_blocks=4, rank=16), GPUS["h100"])
        >>> round(found.waves, 2), round(found.main_loop, 2), round(found.share, 2)
        (0.97, 0.89, 0.79)
    """
    check_kind("problem", problem, Problem)
    check_kind("gpu", gpu, Gpu)
    check_kind("ieee", ieee, bool)
    check_count("tokens", problem.tokens)
    p, tile = problem, GRAD_TILE
    tiles = grad_tiles(p)
    launches = gradient_parts(p)  # one for each part of the tokens, all like the first
    programs = tiles * token_splits(launches[0], tiles, gpu.multiprocessors, GRAD_STEP)
    steps = math.ceil(launches[0] * tiles / programs / GRAD_STEP)
    waves = programs / gpu.multiprocessors
    # A step loads a tile of each operand: tile / itemsize products and sums for each byte of them.
    fed = tile / p.dtype.itemsize * CACHE_OVER_MEMORY * gpu.bytes_per_second
    return GradShare(
        tiles=p.tokens
        * p.weight_elements
        / p.num_blocks
        / (len(launches) * programs * steps * GRAD_STEP * tile**2),
        waves=waves / math.ceil(waves),
        main_loop=steps / (steps + GRAD_EPILOGUE_STEPS),
        cache=min(1.0, fed / gpu.flops_per_second(p.dtype, ieee)),
    )
