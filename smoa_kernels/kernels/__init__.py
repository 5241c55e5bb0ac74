"""Triton kernels, one file each; `KERNELS` names them all.

They are imported when they are launched, or when `KERNELS` is asked for: the package works without Triton, and so do
`architectures`, `spec` and `table`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .spec import Kernel

    KERNELS: Mapping[str, Kernel]

__all__ = ["KERNELS"]


def __getattr__(name: str) -> Mapping[str, Kernel]:
    if name != "KERNELS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import (
        block_grad,
        block_matmul,
        fused_linear,
        grouped_grad,
        grouped_linear,
        modulate,
        permute,
        sum_partials,
    )

    listed = (
        modulate.MODULATED_WEIGHT,
        modulate.MODULATED_BLOCKS,
        permute.PERMUTE,
        block_matmul.BLOCK_MATMUL,
        fused_linear.FUSED_LINEAR,
        block_grad.BLOCK_GRAD,
        grouped_linear.GROUPED_LINEAR,
        grouped_linear.GROUPED_LINEAR_GATHERED,
        grouped_grad.GROUPED_GRAD,
        grouped_grad.GROUPED_GRAD_GATHERED,
        sum_partials.SUM_PARTIALS,
    )
    globals()[name] = kernels = {kernel.name: kernel for kernel in listed}
    return kernels
