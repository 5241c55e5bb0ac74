"""A small tolerant sketch of a weight: is this the base that an adapter was trained on?

The same base in bf16, or dequantised from NF4, must be recognised, so a bitwise hash will not do. The sketch is
32 random projections `uᵀ W0 v` with signs u, v, over W0's Frobenius norm, and the logarithm of that norm: an
error of relative size ε moves the projections by about ε, another weight by about √2.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from ..checks import check_kind, layout_of
from .precision import without_autocast
from .spectral_order import one_thread, whole

__all__ = ["sketch_distance", "sketch_weight"]

PROJECTIONS = 32
SKETCH_SIZE = PROJECTIONS + 1
# NF4 and int4 err by about 0.1, an unrelated weight by 1.4.
TOLERANCE = 0.35

# Elements below which threads cost more than they compute: beside other busy processes, hundreds of such products
# in a row, as loading makes them, took ten times as long on two threads as on one.
_SMALL = 2**22


def sketch_weight(weight: Tensor) -> Tensor:
    """float32 (33,) on W0's device: 32 projections, then log2 of the norm. Any floating dtype and strides.

    Args:
        weight: W0 (N, C), any floating dtype and strides.

    Raises:
        TypeError, ValueError: what has no sketch.

    Example:
        >>> sketch_weight(torch.randn(6, 8)).shape
        torch.Size([33])
    """
    check_kind("weight", weight, Tensor)
    if layout_of(weight) != "torch.strided":
        raise TypeError(f"weight must be a dense tensor, got layout {layout_of(weight)}")
    if weight.ndim != 2 or not weight.is_floating_point():
        given = f"{weight.dtype} {tuple(weight.shape)}"
        raise TypeError(f"weight must be a matrix of floating-point numbers, got {given}")
    weight = whole(weight).detach()
    with one_thread() if weight.numel() < _SMALL else nullcontext(), without_autocast(weight):
        return _sketch(weight.to(torch.float32))


def _sketch(weight: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(weight).clamp_min(torch.finfo(torch.float32).tiny)
    u, v = (_signs(size, side, weight.device) for side, size in enumerate(weight.shape))
    projections = ((u.T @ weight) * v.T).sum(1)
    return torch.cat([projections / norm, norm.log2()[None]])


def sketch_distance(first: Tensor, second: Tensor) -> float:
    """About the relative difference of the two weights; same base when below `TOLERANCE`.

    Args:
        first: float32 (33,), from :func:`sketch_weight`.
        second: likewise.

    Raises:
        TypeError, ValueError: one that is no sketch.

    Example:
        >>> weight = torch.randn(64, 48)
        >>> sketch_distance(sketch_weight(weight), sketch_weight(weight.bfloat16())) < TOLERANCE
        True
        >>> sketch_distance(sketch_weight(weight), sketch_weight(torch.randn(64, 48))) < TOLERANCE
        False
    """
    for name, sketch in (("first", first), ("second", second)):
        check_kind(name, sketch, Tensor)
        if layout_of(sketch) != "torch.strided" or sketch.shape != (SKETCH_SIZE,) or sketch.is_meta:
            raise TypeError(f"{name} must be a sketch, {SKETCH_SIZE} numbers")
    difference = first.detach().float().cpu() - second.detach().float().cpu()
    projections = difference[:-1].square().mean().sqrt()
    return float(torch.maximum(projections, difference[-1].abs()))


def _signs(size: int, side: int, device: torch.device) -> Tensor:
    return torch.from_numpy(_host_signs(size, side)).to(device)


# A model has few sizes, and each of its layers asks for two. Arrays, since a tensor that is made in a fake or
# functional mode must not outlive it.
@functools.lru_cache(maxsize=64)
def _host_signs(size: int, side: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    # random_raw is the one output of numpy's generators that is promised to stay the same.
    words = np.random.PCG64(side).random_raw(size)
    bits = (words[:, None] >> np.arange(PROJECTIONS, dtype=np.uint64)) & np.uint64(1)
    return (1.0 - 2.0 * bits).astype(np.float32)
