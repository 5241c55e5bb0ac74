"""The cost model: predicted time of each way to run one layer.

    device(part) = launches · start + max(flops / GEMM rate, bytes / memory's rate, bytes / cache's rate)
    time(pass)   = max(Σ device(part), launches · host seconds of one)

summed over the parts that `counts.py` lists. Host and device work side by side, so a pass that Python launches kernel
by kernel takes as long as the slower of them. In a CUDA graph the device's time is left. Every device time is
predicted, none measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .counts import Part, Pass, parts
from .gpus import Gpu, Rates
from .problem import Problem

__all__ = ["Estimate", "estimate"]

# What Python takes for one launch, autograd included (measured on CPU): PEFT's LoRA 88 µs for the 5 launches of a
# forward and 111 for the 7 of a backward, HiRA 90 and 116; ours 564 µs for the 9 of both (`make host-time`), a quarter
# less since launches have plans, which was measured in a busier hour only (docs/gpu.md).
LAUNCH_SECONDS = 17e-6
OUR_LAUNCH_SECONDS = 63e-6
OURS = ("merged", "split", "fused")


@dataclass(frozen=True)
class Estimate:
    """The predicted cost of one way to run a problem on one GPU.

    Attributes:
        algorithm: one of :data:`smoa_kernels.tuning.counts.WAYS`.
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
