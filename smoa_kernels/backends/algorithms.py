"""The triton backend's rule of "auto" without a tuning table; nothing here needs Triton."""

from __future__ import annotations

from ..definition.precision import PRECISIONS
from ..kernels.architectures import facts

# Above these ρ the fused kernel takes the rank in chunks and loads nothing ahead.
FUSED_MAX_RANK = 64
FUSED_MAX_RANK_IEEE = 16  # float32 products in IEEE hold their whole depth in registers


def choose_algorithm(tokens: int, rank: int, dtype: str, arch: str, slices: int = 1) -> str:
    """Choose "fused" for few tokens, "split" for some more where blocks are slices, else "merged", for y and dX alike.

    With few tokens reading W0 takes most of the time; "fused" reads it once and builds no weight. But it multiplies
    twice per element and slower than a GEMM, so with more tokens a GEMM is faster. The limit is
    `Architecture.fused_tokens` in half types, half of it if an element is twice as large, and half of that in
    IEEE float32. By the roofline (`smoa-kernels roofline`) the two meet at the limit or above it in half types and in
    TF32, and at about the limit in IEEE float32 without tensor cores (tests/test_roofline.py). On a B200 the kernel's
    instructions are the limit before its products are, and `fused_tokens` is a quarter of the others'.

    "merged" writes a W_eff as large as W0, "split" a ΔW of 1/K of it, and multiplies 1/K more. Where nothing is
    gathered, split is predicted to be faster up to `Architecture.split_tokens` tokens for each block, an eighth of that
    in IEEE float32. None of this is measured: `smoa-kernels tune` measures.

    Args:
        tokens: T.
        rank: ρ, for "fused" at most 64, or 16 in IEEE float32.
        dtype: that the GEMM multiplies, one of `precision.KERNEL_PRECISIONS`.
        arch: as the compiler spells it.
        slices: K where blocks are slices of one size, else 1.
    """
    precision, limits = PRECISIONS[dtype], facts(arch)
    few = limits.fused_tokens * 2 // precision.dtype.itemsize // (2 if precision.ieee else 1)
    if tokens <= few and rank <= (FUSED_MAX_RANK_IEEE if precision.ieee else FUSED_MAX_RANK):
        return "fused"
    some = limits.split_tokens * slices // (8 if precision.ieee else 1)
    return "split" if slices > 1 and tokens <= some else "merged"
