"""The grids of problems that are measured, by kind of device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from smoa_kernels.definition.precision import has_gemm

from .protocol import DEVICE
from .providers import Case

BF16 = torch.bfloat16
MOST_BY_LOOPS = 2**28
"""Most multiplications of a forward by torch's loops: half a second; the backward takes several."""

# Four numbers of blocks give the curve over K; each other case changes one thing, or has a shape of its own.
CPU_LAYERS = (
    Case(2048, 2048, 2048, 1, 16),
    Case(2048, 2048, 2048, 2, 16),
    Case(2048, 2048, 2048, 4, 16),
    Case(2048, 2048, 2048, 8, 16),
    Case(2048, 2048, 2048, 4, 16, dropout=0.05),
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
# The cases that the cost model predicts for an H100, until one measures them.
SQUARE = Case(8192, 4096, 4096, 4, 16, BF16)
GPU_LAYERS = (
    *(replace(SQUARE, num_blocks=blocks) for blocks in (1, 2, 4, 8)),
    *(replace(SQUARE, dropout=0.05), replace(SQUARE, rank=64), replace(SQUARE, dtype=torch.float32)),
    *(replace(SQUARE, out_features=14336), replace(SQUARE, in_features=14336)),
    *(replace(SQUARE, tokens=tokens) for tokens in (64, 512)),
)
# Three numbers of tokens give the curve over T.
CPU_MEMORY = (
    *(Case(tokens, 2048, 2048, 4, 16) for tokens in (128, 512, 2048)),
    Case(512, 2048, 2048, 4, 16, dropout=0.05),
    *(Case(tokens, 2048, 2048, 4, 16, BF16) for tokens in (512, 2048)),
)
GPU_MEMORY = (
    *(replace(SQUARE, tokens=tokens) for tokens in (512, 2048, 8192)),
    *(replace(SQUARE, dropout=0.05), replace(SQUARE, out_features=14336)),
)
LAYERS, MEMORY = (GPU_LAYERS, GPU_MEMORY) if DEVICE.type == "cuda" else (CPU_LAYERS, CPU_MEMORY)
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
