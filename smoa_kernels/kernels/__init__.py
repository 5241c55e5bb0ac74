"""Triton kernels, one file each. Imported only where they are launched: the package works without Triton.

`KERNELS` is the one list of them.
"""

from .block_grad import BLOCK_GRAD
from .block_matmul import BLOCK_MATMUL
from .fused_linear import FUSED_LINEAR, SUM_PARTS
from .grouped_grad import GROUPED_GRAD, GROUPED_GRAD_GATHERED
from .grouped_linear import GROUPED_LINEAR, GROUPED_LINEAR_GATHERED
from .modulate import MODULATED_BLOCKS, MODULATED_WEIGHT
from .permute import GATHER_BOTH, PERMUTE
from .spec import KERNELS
from .sum_partials import SUM_PARTIALS

__all__ = ["KERNELS"]

KERNELS.update(
    (kernel.name, kernel)
    for kernel in (
        MODULATED_WEIGHT,
        MODULATED_BLOCKS,
        PERMUTE,
        GATHER_BOTH,
        BLOCK_MATMUL,
        FUSED_LINEAR,
        BLOCK_GRAD,
        GROUPED_LINEAR,
        GROUPED_LINEAR_GATHERED,
        GROUPED_GRAD,
        GROUPED_GRAD_GATHERED,
        SUM_PARTS,
        SUM_PARTIALS,
    )
)
