"""The cases that a bring-up compares and tunes. `make bench` on a GPU compares the same."""

from __future__ import annotations

import torch

from smoa_kernels.kernels.spec import GRANULE
from smoa_kernels.tuning.roofline import Problem

from ..providers import BF16, Case

SHAPES = ((4096, 4096), (14336, 4096))
TOKENS = (8192, 2048, 1)
BLOCKS, RANK = 4, 16
ORDERS = ("spectral", "contiguous")

SQUARE, DOWN = Case(8192, 4096, 4096, BLOCKS, RANK, BF16), Case(8192, 4096, 14336, BLOCKS, RANK, BF16)
SQUARE_HIRA, DOWN_HIRA = Case(8192, 4096, 4096, 1, RANK, BF16), Case(8192, 4096, 14336, 1, RANK, BF16)
CHECKED_CASES = (SQUARE, DOWN, SQUARE_HIRA, DOWN_HIRA)
"""They are compared first, and their numbers are checked at their own size."""
GATE_TOKENS = 256
"""Of the other cases when their numbers are checked: the definition in float64 takes longer than all timings."""


def operator_cases(smoke: bool) -> list[tuple[Case, str]]:
    """Problems for the layer, each with an order of its blocks, from one token to several tiles of tokens."""
    dtypes = (torch.float32,) if smoke else (torch.bfloat16, torch.float16, torch.float32)
    tokens = (1, 21) if smoke else (1, 40, 300, 2000)
    n, c = (48, 40) if smoke else (384, 640)
    return [
        (Case(t, n, c, BLOCKS, RANK, dtype), order) for dtype in dtypes for order in ORDERS for t in tokens
    ]


def headline_cases(smoke: bool) -> tuple[Case, ...]:
    """The checked cases, then the other sizes; cases with the same weight and partition follow each other."""
    if smoke:
        return (Case(9, 48, 40, 2, 4), Case(1, 48, 40, 2, 4))
    grid = (Case(tokens, n, c, BLOCKS, RANK, BF16) for n, c in SHAPES for tokens in TOKENS)
    return tuple(dict.fromkeys((*CHECKED_CASES, *grid)))


def tuned_layers(smoke: bool) -> list[Problem]:
    """The shapes that are compared, with blocks of single coordinates and of granules."""
    if smoke:
        return [Problem(9, 48, 40, 2, 4, "fp32")]
    sizes = ((tokens, n, c) for tokens in TOKENS for n, c in SHAPES)
    return [
        Problem(*size, BLOCKS, RANK, "bf16", granule, factors="bf16")
        for size in sizes
        for granule in (1, GRANULE)
    ]
