"""The triton backend's rule of "auto" without a tuning table; nothing here needs Triton."""

from __future__ import annotations

from ..definition.precision import PRECISIONS
from ..kernels.architectures import limits

# Above these ρ the fused kernel takes the rank in chunks and loads nothing ahead.
FUSED_MAX_RANK = 64
FUSED_MAX_RANK_IEEE = 16  # float32 products in IEEE hold their whole depth in registers


def choose_algorithm(tokens: int, rank: int, dtype: str, arch: str) -> str:
    """Choose "fused" for few tokens, else "merged", for y and dX alike.

    With few tokens reading W0 takes most of the time; "fused" reads it once and builds no weight. But it multiplies
    twice per element and slower than a GEMM, so with more tokens a GEMM is faster. The limit is
    `Architecture.fused_tokens` in half types, half of it if an element is twice as large, and half of that in
    IEEE float32. By the roofline (`benchmarks/predict`) the two meet at the limit or above it in half types and in
    TF32, and at about the limit in IEEE float32 without tensor cores (tests/test_predict.py). On a B200 the kernel's
    instructions are the limit before its products are, and `fused_tokens` is a quarter of the others'.

    For some tokens more, contiguous blocks may be faster by "split", which writes 1/K of W_eff and multiplies 1/K more:
    up to 128·K by the roofline, in a CUDA graph. Outside of a graph the host's launches count, and split has one more.
    Only a tuning table chooses it. None of this is measured: `smoa-kernels tune` measures.

    Args:
        tokens: T.
        rank: ρ, for "fused" at most 64, or 16 in IEEE float32.
        dtype: that the GEMM multiplies, one of `precision.KERNEL_PRECISIONS`.
        arch: as the compiler spells it.
    """
    most = FUSED_MAX_RANK_IEEE if PRECISIONS[dtype].ieee else FUSED_MAX_RANK
    return "fused" if tokens <= fused_tokens(dtype, arch) and rank <= most else "merged"


def fused_tokens(dtype: str, arch: str) -> int:
    """The most tokens for which "auto" is "fused"."""
    precision = PRECISIONS[dtype]
    return limits(arch).fused_tokens * 2 // precision.dtype.itemsize // (2 if precision.ieee else 1)
