"""The triton backend's algorithms, and which of them "auto" runs where a tuning table does not say otherwise."""

from __future__ import annotations

from ..definition.precision import PRECISIONS
from ..kernels.architectures import facts

__all__ = ["ALGORITHMS", "admissible", "choose_algorithm"]

ALGORITHMS = ("merged", "split", "fused")

# Above these ρ the one-kernel form cuts the rank into chunks, and reads W0 again for each.
FUSED_MAX_RANK = 64
FUSED_MAX_RANK_IEEE = 16  # float32 products in IEEE hold their whole depth in registers


def admissible(stage: str, dtype: str) -> tuple[str, ...]:
    """What may be chosen for speed.

    A W_eff rounded to half, or multiplied in TF32, loses a small update in the forward; in dX that is a second-order
    error.

    Args:
        stage: "forward" or "input_gradient".
        dtype: that the GEMM multiplies, one of `precision.KERNEL_PRECISIONS`.
    """
    if stage == "input_gradient":
        return ("merged", "fused")
    return ALGORITHMS if dtype == "fp32" else ("split", "fused")


def choose_algorithm(stage: str, tokens: int, rank: int, dtype: str, arch: str) -> str:
    """Choose "fused" for few tokens, else "merged" where it is admissible, else "split"; dropout is always split.

    With few tokens reading W0 takes longer than anything else, and "fused" reads it once and builds no weight. But it
    multiplies twice for each element, so with more tokens a GEMM is faster. By the roofline (`smoa-kernels roofline`)
    they meet, for layers of 2048 to 8192 features and r = 16, at 40 to 200 tokens in half types and in TF32, and at 8
    to 80 in IEEE float32. On a B200 the kernel's instructions are the limit before its products are. So
    `Architecture.fused_tokens` is 64, there 16, half of it where an element takes twice the room, and half of that in
    IEEE float32. None of this is measured: `smoa-kernels tune` measures.

    Args:
        stage: "forward" or "input_gradient".
        tokens: T.
        rank: ρ. Above 64, or 16 in IEEE float32, "fused" would read W0 several times.
        dtype: that the GEMM multiplies, one of `precision.KERNEL_PRECISIONS`.
        arch: as the compiler spells it.
    """
    precision = PRECISIONS[dtype]
    limit = facts(arch).fused_tokens * 2 // precision.dtype.itemsize // (2 if precision.ieee else 1)
    if tokens <= limit and rank <= (FUSED_MAX_RANK_IEEE if precision.ieee else FUSED_MAX_RANK):
        return "fused"
    return "merged" if "merged" in admissible(stage, dtype) else "split"
