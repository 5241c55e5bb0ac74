"""The cost model: predicted time of each way to run one layer, and the choice that `algorithm="auto"` makes.

    time(part) = max(flops / rate, bytes / bandwidth),   time(way) = Σ time(part)

summed over the parts that `counts.py` lists. Nothing here is measured: every number is a prediction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch

from ..definition.precision import precision_of
from .counts import FUSED_MAX_RANK, FUSED_MAX_RANK_IEEE, Part, Pass, parts
from .gpus import Gpu
from .problem import Problem

__all__ = ["Estimate", "choose_algorithm", "estimate", "fused_token_limit"]


@dataclass(frozen=True)
class Estimate:
    """The predicted cost of one way to run a problem on one GPU.

    Attributes:
        algorithm: one of :data:`smoa_kernels.cost.counts.WAYS`.
        parts: forward, then backward.
        flops_per_second: a large GEMM's rate.
        bytes_per_second: memory's bandwidth.
    """

    algorithm: str
    parts: tuple[Part, ...]
    flops_per_second: float
    bytes_per_second: float

    def select(self, stage: Pass | Literal["both"]) -> tuple[Part, ...]:
        """The parts of the forward pass, the backward pass, or both."""
        return tuple(p for p in self.parts if stage in ("both", p.stage))

    def seconds(self, stage: Pass | Literal["both"] = "both") -> float:
        """Predicted time of the forward pass, the backward pass, or both."""
        return sum(p.seconds(self.flops_per_second, self.bytes_per_second) for p in self.select(stage))

    def flops(self, stage: Pass | Literal["both"] = "both") -> int:
        """Floating-point operations."""
        return sum(p.flops for p in self.select(stage))

    def bytes(self, stage: Pass | Literal["both"] = "both") -> int:
        """Bytes to and from memory."""
        return sum(p.bytes for p in self.select(stage))


def estimate(problem: Problem, gpu: Gpu, algorithm: str, *, ieee: bool = True) -> Estimate:
    """Predict the cost of one algorithm on one GPU.

    `ieee`: float32 multiplies in IEEE float32 rather than TF32; half types and float64 ignore it.
    """
    rate = gpu.flops_per_second(problem.dtype, ieee)
    return Estimate(algorithm, parts(problem, algorithm), rate, gpu.bytes_per_second)


@lru_cache(maxsize=4096)
def choose_algorithm(problem: Problem, gpu: Gpu, ieee: bool) -> str:
    """Choose what `algorithm="auto"` runs on the triton backend: "merged", "split" or "fused".

    1. With dropout: "split". The adapter sees another x than the base, so one weight cannot stand for both.
    2. Up to :func:`fused_token_limit` tokens: "fused", one kernel that reads W0 once. Above a rank of 64 (of 16
       where float32 multiplies in IEEE) its loop over W0 is not pipelined: there it runs only if a user asks for it.
    3. Where the GEMM multiplies in IEEE float32 or float64: "merged", one GEMM.
    4. Otherwise (bf16, fp16, TF32): "split". A small update is lost when W_eff is rounded to a half type, so there
       "merged" runs only if a user asks for it.

    `problem.dtype` is the dtype that the GEMM multiplies. `ieee` says that it does so in IEEE float32 or float64, not
    in TF32 or under autocast; half types ignore it.
    """
    if problem.dropout:
        return "split"
    if problem.tokens <= fused_token_limit(replace(problem, tokens=0), gpu, ieee):
        return "fused"
    return _many_tokens(problem.dtype, ieee)


def _many_tokens(dtype: torch.dtype, ieee: bool) -> str:
    return "merged" if precision_of(dtype, ieee).ieee else "split"


def _fused_max_rank(dtype: torch.dtype, ieee: bool) -> int:
    return FUSED_MAX_RANK_IEEE if ieee and dtype.itemsize >= 4 else FUSED_MAX_RANK


@lru_cache(maxsize=4096)
def fused_token_limit(problem: Problem, gpu: Gpu, ieee: bool) -> int:
    """Predict up to how many tokens the one-kernel form is no slower than "merged" or "split" in forward; 0 if never.

    At few tokens reading W0 takes longer than the one kernel's doubled arithmetic. It wins there, since it builds no
    weight. With more tokens it loses, and keeps losing. `problem.tokens` is ignored; the rest is as for
    :func:`choose_algorithm`.
    """
    if problem.max_rank > _fused_max_rank(problem.dtype, ieee):
        return 0
    other = _many_tokens(problem.dtype, ieee)

    def fused_wins(tokens: int) -> bool:
        at = replace(problem, tokens=tokens)
        one, many = (estimate(at, gpu, way, ieee=ieee).seconds("forward") for way in ("fused", other))
        return one <= many

    if not fused_wins(1):
        return 0
    low, high = 1, 2
    while fused_wins(high) and high < 1 << 20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fused_wins(middle) else (low, middle)
    return low
