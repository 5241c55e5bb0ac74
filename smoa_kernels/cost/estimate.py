"""Cost model: predicted time and memory of each way to run one layer, and the choice between ours.

    time(part) = max(flops / rate, bytes / bandwidth),   time(way) = Σ time(part)

over the parts that `counts.py` lists. Nothing here is measured. Every number is a prediction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..checks import cached, check_choice, check_kind
from ..definition.precision import precision_of
from .counts import (
    ALGORITHMS,
    FUSED_MAX_RANK,
    FUSED_MAX_RANK_IEEE,
    Part,
    Pass,
    parts,
)
from .gpus import Gpu
from .problem import Problem

__all__ = [
    "ALGORITHMS",
    "Estimate",
    "Part",
    "Problem",
    "choose_algorithm",
    "estimate",
    "fused_token_limit",
    "parts",
]


@dataclass(frozen=True)
class Estimate:
    """What one way to run a problem is predicted to cost on one GPU.

    Attributes:
        algorithm: one of :data:`ALGORITHMS`.
        parts: forward, then backward.
        flops_per_second: a large GEMM's rate.
        bytes_per_second: memory's bandwidth.

    Example:
        >>> from smoa_kernels.cost.gpus import GPUS
        >>> problem = Problem(8192, 4096, 4096, num_blocks=4, rank=16)
        >>> split, frozen = (estimate(problem, GPUS["h100"], way) for way in ("split", "frozen"))
        >>> round(split.seconds() / frozen.seconds(), 2)
        1.46
    """

    algorithm: str
    parts: tuple[Part, ...]
    flops_per_second: float
    bytes_per_second: float

    def select(self, stage: Pass | Literal["both"]) -> tuple[Part, ...]:
        """The parts of the forward pass, the backward pass, or both.

        Args:
            stage: "forward", "backward" or "both".

        Raises:
            ValueError: another one.
        """
        check_choice("stage", stage, ("forward", "backward", "both"))
        return tuple(p for p in self.parts if stage in ("both", p.stage))

    def seconds(self, stage: Pass | Literal["both"] = "both") -> float:
        """Predicted time.

        Args:
            stage: "forward", "backward" or "both".
        """
        return sum(p.seconds(self.flops_per_second, self.bytes_per_second) for p in self.select(stage))

    def flops(self, stage: Pass | Literal["both"] = "both") -> int:
        """Floating-point operations.

        Args:
            stage: "forward", "backward" or "both".
        """
        return sum(p.flops for p in self.select(stage))

    def bytes(self, stage: Pass | Literal["both"] = "both") -> int:
        """Bytes to and from memory.

        Args:
            stage: "forward", "backward" or "both".
        """
        return sum(p.bytes for p in self.select(stage))


def estimate(problem: Problem, gpu: Gpu, algorithm: str, *, ieee: bool = True) -> Estimate:
    """Predict one algorithm on one GPU.

    Args:
        problem: the layer and the batch.
        gpu: one of :data:`smoa_kernels.cost.gpus.GPUS` or :func:`smoa_kernels.cost.gpus.match_gpu`'s answer.
        algorithm: one of :data:`ALGORITHMS`.
        ieee: float32 multiplies in IEEE float32 rather than TF32; half types and float64 ignore it.

    Raises:
        TypeError: a problem or GPU that is none.
        ValueError: an unknown algorithm, or a dtype that no GPU's table has.

    Example:
        >>> from smoa_kernels.cost.gpus import GPUS
        >>> found = estimate(Problem(8192, 4096, 4096, num_blocks=4, rank=16), GPUS["h100"], "merged")
        >>> f"{found.seconds('forward') * 1e3:.2f} ms, predicted"
        '0.41 ms, predicted'
    """
    check_kind("problem", problem, Problem)
    check_kind("gpu", gpu, Gpu)
    check_kind("ieee", ieee, bool)
    rate = gpu.flops_per_second(problem.dtype, ieee)
    return Estimate(algorithm, parts(problem, algorithm), rate, gpu.bytes_per_second)


@cached
def choose_algorithm(problem: Problem, gpu: Gpu, ieee: bool) -> str:
    """What `algorithm="auto"` runs on the triton backend: "merged", "split" or "fused".

    1. Dropout active: "split". The adapter sees another x than the base, so no single weight stands for both.
    2. At most :func:`fused_token_limit` tokens: "fused", one kernel that reads W0 once. Never above the ranks at
       which its loop over W0 is still pipelined (64; 16 where float32 multiplies in IEEE): such a launch is no
       shipped configuration, though a user can force it.
    3. The GEMM multiplies in IEEE float32 or float64: "merged", one GEMM.
    4. Otherwise (bf16, fp16, TF32): "split". W_eff rounded to a half type loses a small update altogether, so
       "merged" is never chosen there; only a user can force it.

    Args:
        problem: the layer and the batch; `dtype` is the dtype that the GEMM multiplies.
        gpu: from :func:`smoa_kernels.cost.gpus.match_gpu` or :data:`smoa_kernels.cost.gpus.GPUS`.
        ieee: the GEMM multiplies in IEEE float32 or float64. False for half types, whatever is given here
            for them, and for float32 under TF32 or autocast.

    Raises:
        TypeError: naming the argument of another kind.

    Example:
        >>> from smoa_kernels.cost.gpus import GPUS
        >>> problem = Problem(8192, 4096, 4096, num_blocks=4, rank=16)
        >>> choose_algorithm(problem, GPUS["h100"], ieee=False)
        'split'
        >>> choose_algorithm(replace(problem, tokens=16), GPUS["h100"], ieee=False)
        'fused'
    """
    check_kind("problem", problem, Problem)
    check_kind("gpu", gpu, Gpu)
    check_kind("ieee", ieee, bool)
    if problem.dropout:
        return "split"
    if problem.tokens <= fused_token_limit(replace(problem, tokens=0), gpu, ieee):
        return "fused"
    return _many_tokens(problem.dtype, ieee)


def _many_tokens(dtype: torch.dtype, ieee: bool) -> str:
    return "merged" if precision_of(dtype, ieee).ieee else "split"


def _fused_max_rank(dtype: torch.dtype, ieee: bool) -> int:
    return FUSED_MAX_RANK_IEEE if ieee and dtype.itemsize >= 4 else FUSED_MAX_RANK


@cached
def fused_token_limit(problem: Problem, gpu: Gpu, ieee: bool) -> int:
    """Most tokens at which one kernel's forward is predicted no slower than merged's or split's; 0 if none.

    While W0's read hides its doubled arithmetic the one kernel wins, since it builds nothing; past that it
    loses and stays behind. `problem.tokens` is ignored.

    Args:
        problem: the layer; its `dtype` is the dtype that the GEMM multiplies.
        gpu: as in :func:`choose_algorithm`.
        ieee: likewise.

    Raises:
        TypeError: naming the argument of another kind.

    Example:
        >>> from smoa_kernels.cost.gpus import GPUS
        >>> problem = Problem(0, 4096, 4096, num_blocks=4, rank=16)
        >>> 100 < fused_token_limit(problem, GPUS["h100"], ieee=False) < 1000
        True
        >>> fused_token_limit(replace(problem, rank=1024), GPUS["h100"], ieee=False)
        0
    """
    check_kind("problem", problem, Problem)
    check_kind("gpu", gpu, Gpu)
    check_kind("ieee", ieee, bool)
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
