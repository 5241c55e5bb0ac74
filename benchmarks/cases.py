"""The grids of problems that are measured on a CPU; on a GPU they are those of a bring-up."""

from __future__ import annotations

import pytest
import torch

from smoa_kernels.definition.precision import has_gemm

from .bringup.cases import headline_cases
from .protocol import DEVICE
from .providers import BF16, Case

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
# Three numbers of tokens give the curve over T.
CPU_MEMORY = (
    *(Case(tokens, 2048, 2048, 4, 16) for tokens in (128, 512, 2048)),
    Case(512, 2048, 2048, 4, 16, dropout=0.05),
    *(Case(tokens, 2048, 2048, 4, 16, BF16) for tokens in (512, 2048)),
)
GPU_CASES = headline_cases(smoke=False) if DEVICE.type == "cuda" else ()
LAYERS, MEMORY = GPU_CASES or CPU_LAYERS, GPU_CASES or CPU_MEMORY
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
