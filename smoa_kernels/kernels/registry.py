"""`KERNELS` names every kernel's specification, for the tuner, the audit and tests; launches hold their own."""

from collections.abc import Mapping
from types import MappingProxyType

from .contract import CONTRACT
from .fused_linear import FUSED_LINEAR
from .grouped_grad import GROUPED_GRAD, GROUPED_GRAD_GATHERED
from .grouped_linear import GROUPED_LINEAR, GROUPED_LINEAR_GATHERED
from .modulate import MODULATED_BLOCKS, MODULATED_WEIGHT
from .permute import PERMUTE
from .spec import Kernel
from .sum_partials import SUM_PARTIALS

_ALL = (MODULATED_WEIGHT, MODULATED_BLOCKS, PERMUTE, FUSED_LINEAR, CONTRACT)
_EXPERTS = (GROUPED_LINEAR, GROUPED_LINEAR_GATHERED, GROUPED_GRAD, GROUPED_GRAD_GATHERED)

KERNELS: Mapping[str, Kernel] = MappingProxyType(
    {kernel.name: kernel for kernel in (*_ALL, *_EXPERTS, SUM_PARTIALS)}
)
"""By their names in tuning tables."""
