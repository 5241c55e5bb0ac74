"""The cost model: predicted time of each way to run one layer, and the choice that `algorithm="auto"` makes.

    device(part) = launches · start + max(flops / GEMM rate, bytes / memory's rate, bytes / cache's rate)
    time(pass)   = max(Σ device(part), launches · host seconds of one)

summed over the parts that `counts.py` lists. Host and device work side by side, so a pass that Python launches kernel
by kernel takes as long as the slower of them. In a CUDA graph the device's time is left, and by it alone "auto"
chooses: what a layer computes must not depend on how it is launched. Every device time is predicted, none measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch

from ..definition.precision import precision_of
from .counts import FUSED_MAX_RANK, FUSED_MAX_RANK_IEEE, FUSED_TOKENS, Part, Pass, parts
from .gpus import Gpu, Rates
from .problem import Problem

__all__ = ["Estimate", "choose_algorithm", "estimate", "fused_token_limit"]


# What Python takes for one launch, autograd included (measured on CPU): PEFT's LoRA 88 µs for the 5 launches of a
# forward and 111 for the 7 of a backward, HiRA 90 and 116; ours 564 µs for the 9 of both (`make host-time`), a quarter
# less since launches have plans, which was measured in a busier hour only (docs/gpu.md).
LAUNCH_SECONDS = 17e-6
OUR_LAUNCH_SECONDS = 63e-6
OURS = ("merged", "split", "fused")

Direction = Literal["forward", "input_gradient"]
"""Which product: y, or dX."""


@dataclass(frozen=True)
class Estimate:
    """The predicted cost of one way to run a problem on one GPU.

    Attributes:
        algorithm: one of :data:`smoa_kernels.cost.counts.WAYS`.
        parts: forward, then backward.
        rates: of the GPU.
    """

    algorithm: str
    parts: tuple[Part, ...]
    rates: Rates

    def select(self, stage: Pass | Literal["both"]) -> tuple[Part, ...]:
        """The parts of the forward pass, the backward pass, or both."""
        return tuple(p for p in self.parts if stage in ("both", p.stage))

    def seconds(self, stage: Pass | Literal["both"] = "both") -> float:
        """Predicted time, launched kernel by kernel: of each pass the longer of host and device."""
        passes: tuple[Pass, ...] = ("forward", "backward") if stage == "both" else (stage,)
        return sum(max(self.device_seconds(each), self.host_seconds(each)) for each in passes)

    def device_seconds(self, stage: Pass | Literal["both"] = "both") -> float:
        """Predicted time of the kernels alone."""
        return sum(p.seconds(self.rates) for p in self.select(stage))

    def host_seconds(self, stage: Pass | Literal["both"] = "both") -> float:
        """Time that Python takes to launch them."""
        return self.launches(stage) * (OUR_LAUNCH_SECONDS if self.algorithm in OURS else LAUNCH_SECONDS)

    def launches(self, stage: Pass | Literal["both"] = "both") -> int:
        """Kernel launches."""
        return sum(p.launches for p in self.select(stage))

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
    return Estimate(algorithm, parts(problem, algorithm, gpu, ieee=ieee), gpu.rates(problem.dtype, ieee))


@lru_cache(maxsize=4096)
def choose_algorithm(problem: Problem, gpu: Gpu, ieee: bool, direction: Direction = "forward") -> str:
    """Choose what `algorithm="auto"` runs on the triton backend: "merged", "split" or "fused".

    1. With dropout: "split". The adapter sees another x than the base, so one weight cannot stand for both.
    2. Up to :func:`fused_token_limit` tokens: "fused", one kernel that reads W0 once. Above a rank of 64 (of 16
       where float32 multiplies in IEEE) its loop over W0 is not pipelined: there it runs only if a user asks for it.
    3. For dX, and where the GEMM multiplies in IEEE float32 or float64: "merged", one GEMM.
    4. Otherwise (y in bf16, fp16, TF32): "split". A small update is lost when W_eff is rounded to a half type, so there
       "merged" runs only if a user asks for it. In dX that is a second-order error.

    `problem.dtype` is the dtype that the GEMM multiplies. `ieee` says that it does so in IEEE float32 or float64, not
    in TF32 or under autocast; half types ignore it.
    """
    if problem.dropout:
        return "split"
    if problem.tokens <= fused_token_limit(replace(problem, tokens=0), gpu, ieee, direction):
        return "fused"
    return _many_tokens(problem.dtype, ieee, direction)


def _many_tokens(dtype: torch.dtype, ieee: bool, direction: Direction) -> str:
    return "merged" if direction == "input_gradient" or precision_of(dtype, ieee).ieee else "split"


def _fused_max_rank(dtype: torch.dtype, ieee: bool) -> int:
    return FUSED_MAX_RANK_IEEE if ieee and dtype.itemsize >= 4 else FUSED_MAX_RANK


@lru_cache(maxsize=4096)
def fused_token_limit(problem: Problem, gpu: Gpu, ieee: bool, direction: Direction = "forward") -> int:
    """Predict up to how many tokens the one-kernel form is no slower than what else would run; 0 if never.

    At few tokens reading W0 takes longer than the one kernel's doubled arithmetic. It wins there, since it builds no
    weight. Its time jumps where a tile of tokens begins, and there it is compared. `problem.tokens` is ignored; the
    rest is as for :func:`choose_algorithm`.
    """
    if problem.max_rank > _fused_max_rank(problem.dtype, ieee):
        return 0
    other = _many_tokens(problem.dtype, ieee, direction)
    # The ways differ in nothing else of a backward than in dX.
    stage: Pass = "forward" if direction == "forward" else "backward"

    def fused_wins(tokens: int) -> bool:
        at = replace(problem, tokens=tokens)
        one, many = (estimate(at, gpu, way, ieee=ieee).device_seconds(stage) for way in ("fused", other))
        return one <= many

    # A tile at a time, and beyond 64 tiles in steps of a sixty-fourth: on a tiny layer it wins at any number of tokens.
    limit, step = 0, FUSED_TOKENS
    while limit < 1 << 20 and fused_wins(limit + 1) and fused_wins(limit + step):
        limit += step
        step = max(FUSED_TOKENS, limit // (64 * FUSED_TOKENS) * FUSED_TOKENS)
    while step > 1:
        step //= 2
        if fused_wins(limit + 1) and fused_wins(limit + step):
            limit += step
    return limit
