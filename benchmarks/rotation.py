"""Give each timed pass another copy of x and dY, so that a copy has left the L2 cache when its turn comes again.

Inside a network a layer's inputs come from another layer and are not in the cache from its own last pass. The weights
are not copied: each provider has its own, and the cache is overwritten before each pass (protocol.py). So they are
cold, like a model's, because other layers run between two uses. Taking turns alone is not enough: a weight of 32 MiB is
still in a cache of 50 MB if its provider comes last in one round and first in the next.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from .protocol import DEVICE
from .providers import Case

Inputs = Iterator[tuple[Tensor, Tensor]]
"""x (T, C), which requires a gradient, and dY (T, N) for one pass after another, without end."""


def cache_bytes() -> int:
    """Size of the GPU's L2 cache; 0 on the CPU, whose cache sizes torch does not report."""
    return torch.cuda.get_device_properties(DEVICE).L2_cache_size if DEVICE.type == "cuda" else 0


def rotated(case: Case, past: int) -> Inputs:
    """Copies of a case's inputs in turn, equal in value.

    There are at least two copies. Between two turns of one copy all others are read, and together they are larger than
    the cache. All copies take at most the size of the cache and two copies.

    Args:
        case: the problem.
        past: bytes of the cache.
    """
    x, dy = case.input(), case.output_gradient()
    others = past // (x.nbytes + dy.nbytes) + 1
    copies = [(x, dy), *((case.input(), case.output_gradient()) for _ in range(others))]
    return itertools.cycle(copies)
