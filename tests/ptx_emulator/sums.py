"""A second implementation of tensor-core products: float64 numpy, element by element."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import ARCH
from .samples import cut_off


def tensor_core_sums(a: Tensor, b: Tensor) -> Tensor:
    """`a b`, summed like an A100's tensor cores (Fasi et al., 2021), or on sm_90 like an H100's (arXiv 2511.10909).

    A few products and the accumulator are aligned to the largest exponent and truncated some bits below float32's last.
    Their sum is truncated to float32.
    """
    tf32, hopper = a.dtype == torch.float32, ARCH == 90
    block = (8 if tf32 else 16) if hopper else (4 if tf32 else 8)
    kept = 25 if hopper else 24
    least = -14 if a.dtype == torch.float16 else -126
    x, y = (cut_off(t).float().numpy().astype(np.float64) for t in (a, b))
    total = np.zeros((x.shape[0], y.shape[1]))
    for k in range(0, x.shape[1], block):
        left, right = x[:, k : k + block, None], y[None, k : k + block, :]
        terms = np.concatenate([left * right, total[:, None, :]], 1)
        exponents = [_exponent(left, least) + _exponent(right, least), _exponent(total, -126)[:, None, :]]
        top = np.concatenate(exponents, 1).max(1)
        exact = np.ldexp(np.trunc(np.ldexp(terms, kept - top[:, None, :])).sum(1), top - kept)
        rounded = exact.astype(np.float32)
        too_large = np.abs(rounded.astype(np.float64)) > np.abs(exact)
        total = np.where(too_large, np.nextafter(rounded, np.float32(0)), rounded).astype(np.float64)
    return torch.from_numpy(total.astype(np.float32))


def _exponent(x: np.ndarray, least: int) -> np.ndarray:
    return np.where(x == 0, -(10**5), np.maximum(np.frexp(x)[1] - 1, least))
