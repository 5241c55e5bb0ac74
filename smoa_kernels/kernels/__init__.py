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


def __getattr__(name: str) -> Mapping[str, Kernel]:
    if name != "KERNELS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import (
        contract,
        fused_linear,
        grouped_grad,
        grouped_linear,
        modulate,
        permute,
        sum_partials,
    )
    from .spec import Kernel

    files = modulate, permute, fused_linear, contract, grouped_linear, grouped_grad, sum_partials
    values = [value for file in files for value in vars(file).values()]
    globals()[name] = kernels = {value.name: value for value in values if isinstance(value, Kernel)}
    return kernels
