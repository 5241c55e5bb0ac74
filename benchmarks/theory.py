"""The rates that this machine reaches, for the cost model."""

from __future__ import annotations

import torch

from .protocol import DEVICE, laps, quartiles


def rates(dtype: torch.dtype = torch.float32, size: int = 1024) -> tuple[float, float]:
    """Measured flop/s of a large GEMM, and bytes/s of a copy that no cache holds."""
    a = torch.randn(size, size, device=DEVICE).to(dtype)
    source = torch.ones(64 * size * size // 4, device=DEVICE)
    target = torch.empty_like(source)
    gemm = quartiles([laps(lambda: a @ a)[0] for _ in range(7)]).median
    copy = quartiles([laps(lambda: target.copy_(source))[0] for _ in range(7)]).median
    return 2 * size**3 / gemm, 2 * source.nbytes / copy
