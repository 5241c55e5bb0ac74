"""Stochastic rounding to one of the two neighbours, with probabilities that make the mean equal the exact value."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

# Elements rounded at a time, an even number: temporaries stay in a processor's cache.
_PANEL = 2**18


def round_stochastically(values: Tensor, dtype: torch.dtype, *, seed: int, name: str) -> Tensor:
    """Round each element to one of its two neighbours in `dtype`: its mean is `values`, to 2^-24 of their distance.

    With neighbours a and b, a nearer to zero, `a + h (b - a)` becomes b if a uniform number in [0, 1) is below h.
    Element i, in the order in which `values` is stored, takes the upper 24 bits of the i-th word of 32 bits that
    numpy's PCG64 gives for the seed `[seed, crc32(name)]`, the lower half of each of its 64-bit words first. numpy
    promises never to change those. Values that `dtype` holds exactly stay; values beyond its range become infinite.

    Args:
        values: floating point, of more digits than `dtype`, on the CPU.
        dtype: bfloat16 or float16.
        seed: at least 0.
        name: tells tensors apart that are rounded with the same seed.

    Returns:
        A contiguous tensor of the same shape.
    """
    words = np.random.PCG64([seed, zlib.crc32(name.encode())])
    rounded = torch.empty(values.shape, dtype=dtype)
    source, target = values.contiguous().view(-1), rounded.view(-1)
    for start in range(0, source.numel(), _PANEL):
        panel = source[start : start + _PANEL]
        size = panel.numel()
        nearest = panel.to(dtype)
        wide = nearest.to(panel.dtype)
        beyond = (wide.abs() > panel.abs()) & wide.isfinite()
        # The bits of a half, read as an integer, order magnitudes: adding 1 gives the next number away from zero.
        bits = nearest.view(torch.int16) - beyond.to(torch.int16)
        inner, outer = (neighbour.view(dtype).to(panel.dtype) for neighbour in (bits, bits + 1))
        # Exact, because the difference has few digits and the step is a power of two.
        chance = (panel - inner) / (outer - inner)
        drawn = words.random_raw(-(-size // 2)).astype("<u8", copy=False).view("<u4")[:size]
        uniform = torch.from_numpy((drawn >> 8).astype(np.float32)).mul_(2.0**-24)
        target[start : start + size] = bits.add_((uniform < chance).to(torch.int16)).view(dtype)
    return rounded
