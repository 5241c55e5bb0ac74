"""Which tile of y a program of `block_matmul` computes where nothing was measured.

The predictions count by it, and need no Triton. The kernel keeps its own list, with all that a launch needs: a test
holds this one against it, which is that of Triton 3.9 and newer.
"""

from __future__ import annotations

from ..definition.precision import precision_of
from ..kernels.architectures import facts
from ..kernels.sizes import bucket
from .gpus import Gpu
from .problem import Problem

__all__ = ["matmul_tile"]

# Tokens and rows of y, largest first.
_TILES: tuple[tuple[int, int], ...] = ((128, 128), (64, 128), (64, 64), (32, 64))
_TILES_WIDE = ((256, 128), *_TILES)
_TILES_AMD = _TILES[:-1]
_TILES_IEEE = ((64, 64), (64, 32), (32, 32))


def matmul_tile(p: Problem, gpu: Gpu, ieee: bool, features: int) -> tuple[int, int]:
    """Tokens and rows of a tile: the largest that divides the blocks and still fills the GPU, else the smallest.

    Args:
        p: the problem.
        gpu: where it runs.
        ieee: float32 multiplies in IEEE float32 rather than TF32.
        features: coordinates of the result, N for y.

    Example:
        >>> from .gpus import GPUS
        >>> p = Problem(8192, 4096, 4096, num_blocks=4, rank=16)
        >>> [matmul_tile(p, GPUS[name], False, 4096) for name in ("h100", "a100")]
        [(256, 128), (128, 128)]
    """
    arch = facts(gpu.arch)
    tiles = _TILES_WIDE if arch.has_wide_tensor_cores else _TILES
    if arch.is_amd:
        tiles = _TILES_AMD
    elif precision_of(p.dtype, ieee).ieee:
        tiles = _TILES_IEEE
    padded, tokens = p.padded(features), bucket(p.tokens)
    fitting = [tile for tile in tiles if padded // p.num_blocks % tile[1] == 0]
    filling = (tile for tile in fitting if -(-tokens // tile[0]) * (padded // tile[1]) >= gpu.multiprocessors)
    return next(filling, fitting[-1])
