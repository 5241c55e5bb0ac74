"""What a GEMM multiplies in: the fact that decides between merged and split."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..checks import check_kind

__all__ = ["gemm_is_ieee", "without_autocast"]


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Multiply in the operands' own dtype where `tensor` is: what autocast may not round.

    Args:
        tensor: any; nothing is multiplied on the meta device, which knows no autocast.

    Raises:
        TypeError: it is none.

    Example:
        >>> x = torch.randn(2, 2)
        >>> with torch.autocast("cpu", torch.bfloat16), without_autocast(x):
        ...     (x @ x).dtype
        torch.float32
    """
    check_kind("tensor", tensor, Tensor)
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def gemm_is_ieee(dtype: torch.dtype, device_type: str) -> bool:
    """Whether a GEMM on operands of `dtype` multiplies them in IEEE float32 or float64.

    What counts is what the GEMM multiplies in, not what is stored: TF32 (or bf16 in oneDNN) keeps as few bits
    of a float32 W_eff as half precision does.

    Args:
        dtype: that the operands have when they are multiplied, autocast applied.
        device_type: "cpu", "cuda", ...

    Raises:
        TypeError: one of them is none.

    Example:
        >>> gemm_is_ieee(torch.float64, "cpu"), gemm_is_ieee(torch.bfloat16, "cpu")
        (True, False)
    """
    check_kind("dtype", dtype, torch.dtype)
    check_kind("device_type", device_type, str)
    if dtype == torch.float64:
        return True
    if dtype != torch.float32:
        return False
    backends: Any = torch.backends  # whose annotations lack mkldnn's matmul settings
    settings = {"cuda": backends.cuda.matmul, "cpu": backends.mkldnn.matmul}
    return device_type not in settings or settings[device_type].fp32_precision in ("ieee", "none")
