"""A sketch of a weight: 33 numbers that tell whether an adapter was trained on this base.

A hash of the bits will not do: the same base in bf16, or dequantised from NF4, must be recognised. The sketch is 32
random projections `uᵀ W0 v`, with vectors of signs u and v, divided by W0's Frobenius norm, and the logarithm of that
norm. A relative error ε in W0 moves the projections by about ε; another weight moves them by about √2.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from .precision import without_autocast
from .spectral_order import one_thread, whole

__all__ = ["sketch_distance", "sketch_weight"]

PROJECTIONS = 32
SKETCH_SIZE = PROJECTIONS + 1
# NF4 and int4 move the sketch by about 0.1, an unrelated weight by 1.4.
TOLERANCE = 0.35

# Smaller weights are sketched on one thread. Loading a model makes hundreds of such products in a row; beside other
# busy processes they took ten times as long on two threads as on one.
_SMALL = 2**22


def sketch_weight(weight: Tensor) -> Tensor:
    """Compute the sketch of a weight: float32 (33,) on its device, 32 projections and log2 of the norm."""
    weight = whole(weight).detach()
    with one_thread() if weight.numel() < _SMALL else nullcontext(), without_autocast(weight):
        return _sketch(weight.to(torch.float32))


def _sketch(weight: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(weight).clamp_min(torch.finfo(torch.float32).tiny)
    u, v = (_signs(size, side, weight.device) for side, size in enumerate(weight.shape))
    projections = ((u.T @ weight) * v.T).sum(1)
    return torch.cat([projections / norm, norm.log2()[None]])


def sketch_distance(first: Tensor, second: Tensor) -> float:
    """Estimate the relative difference of two weights from their sketches; up to `TOLERANCE` they are one base."""
    difference = first.detach().float().cpu() - second.detach().float().cpu()
    projections = difference[:-1].square().mean().sqrt()
    return float(torch.maximum(projections, difference[-1].abs()))


def _signs(size: int, side: int, device: torch.device) -> Tensor:
    return torch.from_numpy(_host_signs(size, side)).to(device)


# Cached: a model has few sizes, and each of its layers asks for two. As numpy arrays: a tensor made in one of torch's
# fake or functional modes must not outlive the mode.
@functools.lru_cache(maxsize=64)
def _host_signs(size: int, side: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    # random_raw is the only output of numpy's generators that numpy promises never to change.
    words = np.random.PCG64(side).random_raw(size)
    bits = (words[:, None] >> np.arange(PROJECTIONS, dtype=np.uint64)) & np.uint64(1)
    return (1.0 - 2.0 * bits).astype(np.float32)
