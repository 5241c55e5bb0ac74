"""The problems that are measured: on a CPU, and on a GPU, where `make bench` compares those of a bring-up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from smoa_kernels.definition.precision import has_gemm

from .protocol import DEVICE
from .providers import BF16, Case

if TYPE_CHECKING:
    from smoa_kernels.tuning.tuner import Layer

MOST_BY_LOOPS = 2**28
"""Most multiplications of a forward by torch's loops: half a second; the backward takes several."""

# Four numbers of blocks give the curve over K; each other case changes one thing, or has a shape of its own.
CPU_LAYERS = (
    Case(2048, 2048, 2048, 1, 16),
    Case(2048, 2048, 2048, 2, 16),
    Case(2048, 2048, 2048, 4, 16),
    Case(2048, 2048, 2048, 8, 16),
    Case(2048, 2048, 2048, 4, 16, dropout=0.05),
    Case(2048, 2048, 2048, 2, 8),  # the recommended setting, in both dtypes
    Case(2048, 2048, 2048, 2, 8, BF16),
    Case(2048, 2048, 2048, 4, 16, BF16),
    Case(2048, 2048, 2048, 8, 16, BF16),
    Case(1024, 1024, 2816, 4, 16),
    Case(1024, 1024, 2816, 4, 64),
    Case(512, 1024, 1024, 8, 16),
    Case(512, 1024, 1024, 8, 16, BF16),
    Case(512, 1024, 1024, 8, 16, BF16, 0.05),
    Case(256, 576, 1536, 2, 8),
    Case(128, 384, 1536, 2, 16),
    Case(128, 576, 1536, 2, 8, BF16),
)
# Three numbers of tokens give the curve over T.
CPU_MEMORY = (
    *(Case(tokens, 2048, 2048, 4, 16) for tokens in (128, 512, 2048)),
    Case(512, 2048, 2048, 4, 16, dropout=0.05),
    *(Case(tokens, 2048, 2048, 4, 16, BF16) for tokens in (512, 2048)),
)
FEW_TOKENS = tuple(
    Case(tokens, 2048, 2048, 4, 8, dtype)
    for dtype in (torch.float32, BF16)
    for tokens in (1, 2, 4, 8, 16, 32)
)


def skip_what_loops_multiply(multiplications: int, dtype: torch.dtype, smoke: bool) -> None:
    """Skip a large case if torch has no GEMM of its half type: a pass of one peer would take up to minutes."""
    loops = dtype == BF16 and DEVICE.type == "cpu" and not has_gemm(dtype)
    if loops and multiplications > MOST_BY_LOOPS and not smoke:
        pytest.skip(
            "torch has no GEMM of bfloat16 for this processor: it would take up to minutes for each pass"
        )


# On a GPU

SHAPES = ((4096, 4096), (14336, 4096))
TOKENS = (8192, 2048, 1)
BLOCKS, RANK = 4, 16
ORDERS = ("spectral", "contiguous")

RECOMMENDED = Case(8192, 4096, 4096, 2, 8, BF16)
SQUARE, DOWN = Case(8192, 4096, 4096, BLOCKS, RANK, BF16), Case(8192, 4096, 14336, BLOCKS, RANK, BF16)
SQUARE_HIRA, DOWN_HIRA = Case(8192, 4096, 4096, 1, RANK, BF16), Case(8192, 4096, 14336, 1, RANK, BF16)
CHECKED_CASES = (RECOMMENDED, SQUARE, DOWN, SQUARE_HIRA, DOWN_HIRA)
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


def tuned_layers(smoke: bool) -> list[Layer]:
    """The shapes that are compared, with blocks of single coordinates and contiguous ones."""
    from smoa_kernels.tuning.tuner import Layer  # needs Triton, which benchmarks on CPUs do without

    if smoke:
        return [Layer(48, 40, 9, "fp32", 4, 2)]
    return [
        Layer(n, c, tokens, "bf16", RANK, BLOCKS, contiguous, factors="bf16")
        for tokens in TOKENS
        for n, c in SHAPES
        for contiguous in (False, True)
    ]


GPU_CASES = headline_cases(smoke=False) if DEVICE.type == "cuda" else ()
LAYERS, MEMORY = GPU_CASES or CPU_LAYERS, GPU_CASES or CPU_MEMORY
