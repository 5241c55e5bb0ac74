"""The triton backend's rule of "auto" without a tuning table; nothing here needs Triton."""

from __future__ import annotations

from ..definition.precision import PRECISIONS
from ..kernels.architectures import facts
from ..kernels.spec import ALGORITHM_KEYS

# Above these ρ the fused kernel takes the rank in chunks and loads nothing ahead.
FUSED_MAX_RANK = 64
FUSED_MAX_RANK_IEEE = 16  # float32 products in IEEE hold their whole depth in registers

# From this T·K on, the kernels are less than 5 % faster than cuBLAS alone on blocks that are one batch.
BATCH_ROWS = 20_000
BATCH_ROWS_IEEE = 2_600


def admissible(stage: str, dtype: str) -> tuple[str, ...]:
    """Name the algorithms that a tuning table may choose, "eager" (torch's own operators) among them.

    In the forward a W_eff that is rounded to half, or multiplied in TF32, loses a small update; in dX the error is of
    second order.

    Args:
        stage: one of `spec.ALGORITHM_KEYS`.
        dtype: that the GEMM multiplies, one of `precision.KERNEL_PRECISIONS`.
    """
    if stage == "forward" and dtype != "fp32":
        return tuple(algorithm for algorithm in ALGORITHM_KEYS[stage] if algorithm != "merged")
    return ALGORITHM_KEYS[stage]


def choose_algorithm(stage: str, tokens: int, rank: int, dtype: str, arch: str, batch: int = 0) -> str:
    """Choose "eager" for many tokens if it takes the blocks as one batch: cuBLAS alone then computes everything.

    The kernels save passes over blocks of W0's size, whatever T is, and multiply no faster than cuBLAS. By
    the roofline of an H100 (700 TFLOP/s in half types, 2.9 TB/s) they save 8 bytes for each element of a block in the
    forward and in dX. That is less than 5 % of the time from T·K = 19,300 on, in half types and in TF32; in IEEE
    float32, whose products are slower, from 2,600 on. For dA and dB it is about the same: at 4096², K = 4, T = 8192 in
    bf16 `block_grad` takes 117 µs if its main loop is as fast as cuBLAS, and cuBLAS 121. These limits are
    smaller on most other GPUs, and 27,000 on an L40S.

    Else choose "fused" for few tokens, else "merged" where it is admissible, else "split"; dropout is always split.
    With few tokens reading W0 takes most of the time; "fused" reads it once and builds no weight. But it multiplies
    twice per element and slower than a GEMM, so with more tokens a GEMM is faster. The limit is
    `Architecture.fused_tokens` in half types, half of it if an element is twice as large, and half of that in
    IEEE float32. By the roofline (`smoa-kernels roofline`) the two meet at the limit or above it in half types and in
    TF32, and at about the limit in IEEE float32 without tensor cores (tests/test_roofline.py). On a B200 the kernel's
    instructions are the limit before its products are, and `fused_tokens` is a quarter of the others'. None of this is
    measured: `smoa-kernels tune` measures.

    Args:
        stage: one of `spec.ALGORITHM_KEYS`.
        tokens: T.
        rank: ρ, for "fused" at most 64, or 16 in IEEE float32.
        dtype: that the GEMM multiplies, one of `precision.KERNEL_PRECISIONS`.
        arch: as the compiler spells it.
        batch: K where eager takes the blocks as one batch (`block_order.is_batch`), else 0.
    """
    precision = PRECISIONS[dtype]
    if tokens * batch >= (BATCH_ROWS_IEEE if precision.ieee else BATCH_ROWS):
        return "eager"
    if stage == "factor_gradients":
        return "block_grad"
    limit = facts(arch).fused_tokens * 2 // precision.dtype.itemsize // (2 if precision.ieee else 1)
    if tokens <= limit and rank <= (FUSED_MAX_RANK_IEEE if precision.ieee else FUSED_MAX_RANK):
        return "fused"
    return "merged" if "merged" in admissible(stage, dtype) else "split"
