"""What the cost model says of this machine: its parts, at the rates that this machine reaches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from smoa_kernels.tuning.counts import parts
from smoa_kernels.tuning.estimate import Estimate
from smoa_kernels.tuning.gpus import GPUS, Rates

from .protocol import DEVICE, laps, quartiles
from .providers import Case


def rates(dtype: torch.dtype = torch.float32, size: int = 1024) -> tuple[float, float]:
    """Measured flop/s of a large GEMM, and bytes/s of a copy that no cache holds."""
    a = torch.randn(size, size, device=DEVICE).to(dtype)
    source = torch.ones(64 * size * size // 4, device=DEVICE)
    target = torch.empty_like(source)
    gemm = quartiles([laps(lambda: a @ a)[0] for _ in range(7)]).median
    copy = quartiles([laps(lambda: target.copy_(source))[0] for _ in range(7)]).median
    return 2 * size**3 / gemm, 2 * source.nbytes / copy


def seconds(case: Case, algorithm: str, flops_per_second: float, bytes_per_second: float) -> float:
    """Predicted seconds of forward and backward; what Python adds is not counted."""
    problem = case.problem()
    rates = Rates(flops_per_second, bytes_per_second)
    return Estimate(algorithm, parts(problem, algorithm, GPUS["h100"]), rates).device_seconds()


def log_log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of log y over log x: the power of x with which y grows; NaN where y is not positive."""
    if min(y) <= 0:
        return math.nan
    log_x, log_y = [math.log(v) for v in x], [math.log(v) for v in y]
    mean_x, mean_y = sum(log_x) / len(x), sum(log_y) / len(y)
    rise = sum((a - mean_x) * (b - mean_y) for a, b in zip(log_x, log_y, strict=True))
    return rise / sum((a - mean_x) ** 2 for a in log_x)
