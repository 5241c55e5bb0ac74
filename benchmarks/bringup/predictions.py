"""What the cost model does not say and the goals ask for: block_grad's share of a GEMM's rate, and peak memory.

    share = tiles · waves · main loop · cache

The cost model takes a large GEMM's rate for our products too, as far as the cache feeds them. The share is what to
expect of the largest of them, at `block_grad`'s largest tile. Assumed, until a GPU has measured it: a program's end
costs `GRAD_EPILOGUE_STEPS` steps of its main loop, and a multiprocessor runs one program at a time. Not modelled: how
a program's pipeline fills and drains, in which order tiles meet in the cache, a clock that falls under load.

Peak memory is counted alike for SMoA and for PEFT: x, dY, weights and factors are there before and are not counted; a
result lives until the last operator that reads it has ended, and an operator's inputs and results live together. What
a BLAS library allocates for itself is not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from smoa_kernels.kernels.sizes import GRAD_EPILOGUE_STEPS, GRAD_STEP, GRAD_TILE, token_splits
from smoa_kernels.tuning.gpus import Gpu
from smoa_kernels.tuning.grad_tiling import grad_tiles, gradient_parts
from smoa_kernels.tuning.problem import Problem
from smoa_kernels.tuning.sectors import overfetch
from smoa_kernels.tuning.workspace import backward_workspace

__all__ = ["GradShare", "block_grad_share", "peak_bytes"]


@dataclass(frozen=True)
class GradShare:
    """What each limit leaves of a large GEMM's rate.

    Attributes:
        tiles: the share of the products that is not padding, of blocks or of the last step of tokens.
        waves: the share of the multiprocessors' time in which they have a program: the last wave is not full.
        main_loop: the share of a program's time before its end, where it gathers W0, contracts and stores.
        cache: the share of the rate that the last cache can feed with operands.
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
    """Predict the share of a large GEMM's rate that counts for `block_grad`; at least one token."""
    p, tile = problem, GRAD_TILE
    tiles = grad_tiles(p)
    launches = gradient_parts(p)  # one for each part of the tokens, all like the first
    programs = tiles * token_splits(launches[0], tiles, gpu.multiprocessors, GRAD_STEP)
    steps = math.ceil(launches[0] * tiles / programs / GRAD_STEP)
    waves = programs / gpu.multiprocessors
    # A step loads a tile of each operand: tile / itemsize products and sums for each byte of them; in place, all
    # sectors in which they lie.
    rates = gpu.rates(p.dtype, ieee)
    moved = overfetch(tile, p.num_blocks, p.dtype.itemsize, p.granule) if p.in_place else 1
    fed = tile / (p.dtype.itemsize * moved) * rates.cache_bytes_per_second
    return GradShare(
        tiles=p.tokens
        * p.weight_elements
        / p.num_blocks
        / (len(launches) * programs * steps * GRAD_STEP * tile**2),
        waves=waves / math.ceil(waves),
        main_loop=steps / (steps + GRAD_EPILOGUE_STEPS),
        cache=min(1.0, fed / rates.flops_per_second),
    )


def peak_bytes(problem: Problem, algorithm: str) -> int:
    """Most bytes that live at once in one forward and backward, y and all gradients included.

    Args:
        problem: the layer and the batch, without dropout.
        algorithm: "frozen", "lora", "merged" or "split".
    """
    return max(_MOMENTS[algorithm](problem))


def _sizes(p: Problem) -> tuple[int, int, int]:
    """Bytes of x, y and W0."""
    size = p.dtype.itemsize
    return p.tokens * p.in_features * size, p.tokens * p.out_features * size, p.weight_elements * size


def _frozen(p: Problem) -> tuple[int, ...]:
    x, y, _ = _sizes(p)
    return (y + x,)


def _lora(p: Problem) -> tuple[int, ...]:
    """PEFT: the base's output, the scaled update and their sum; then y, both parts of dX, dA and dB."""
    x, y, _ = _sizes(p)
    size = p.dtype.itemsize
    return 3 * y + p.tokens * p.rank * size, y + 2 * x + p.rank * (p.in_features + p.out_features) * size


def _merged(p: Problem) -> tuple[int, ...]:
    _, y, w = _sizes(p)
    return w + y, *_our_backward(p)


def _split(p: Problem) -> tuple[int, ...]:
    """y beside the gathered x and the blocks of ΔW."""
    _, y, _ = _sizes(p)
    size, rows, cols = p.dtype.itemsize, p.padded(p.out_features), p.padded(p.in_features)
    gathered = p.tokens * cols * size * p.gathers(p.in_features)
    return y + gathered + rows * cols // p.num_blocks * size, *_our_backward(p)


def _our_backward(p: Problem) -> tuple[int, ...]:
    """y, dA and dB beside each stage's workspace, and dX in the second."""
    x, y, _ = _sizes(p)
    found = backward_workspace(p)
    kept = y + p.max_rank * (p.out_features + p.in_features) * p.dtype.itemsize
    return kept + found["factor gradients"], kept + found["input gradient"] + x


_MOMENTS = {"frozen": _frozen, "lora": _lora, "merged": _merged, "split": _split}
