"""Predicts what one adapted layer costs on one GPU, for SMoA and for what it is compared with. Nothing is measured.

- A part of the work (`counts.py`) takes its start, and then the longer of its flops at the rate of a large GEMM and its
  bytes at that of a copy.
- Host and device work side by side: a pass that Python launches kernel by kernel takes as long as the slower of them.
  In a CUDA graph the device's time is left.

Not modelled: caches, the last wave of a kernel's programs, sums over tokens that programs share, and how much kernels
that are bound by both are slowed by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..backends.algorithms import partial_bytes
from .counts import Part, Pass, Problem, gradient_parts, parts
from .gpus import Gpu, Rates

__all__ = ["Estimate", "backward_workspace", "backward_workspace_bytes", "estimate"]

# What Python takes for one launch, autograd included (measured on CPU): of PEFT's LoRA and HiRA, and of ours
# (`make host-time`: 564 µs for the 9 of a forward and a backward).
LAUNCH_SECONDS = 17e-6
OUR_LAUNCH_SECONDS = 63e-6
OURS = ("merged", "split", "fused")


@dataclass(frozen=True)
class Estimate:
    """The predicted cost of one way to run a problem on one GPU.

    Attributes:
        way: one of :data:`WAYS`.
        parts: forward, then backward.
        rates: of the GPU.
    """

    way: str
    parts: tuple[Part, ...]
    rates: Rates

    def select(self, stage: Pass | Literal["both"] = "both") -> tuple[Part, ...]:
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
        return self.launches(stage) * (OUR_LAUNCH_SECONDS if self.way in OURS else LAUNCH_SECONDS)

    def launches(self, stage: Pass | Literal["both"] = "both") -> int:
        """Kernel launches."""
        return sum(p.launches for p in self.select(stage))

    def flops(self, stage: Pass | Literal["both"] = "both") -> float:
        """Floating-point operations."""
        return sum(p.flops for p in self.select(stage))

    def bytes(self, stage: Pass | Literal["both"] = "both") -> float:
        """Bytes to and from memory."""
        return sum(p.bytes for p in self.select(stage))


def estimate(problem: Problem, gpu: Gpu, way: str, *, ieee: bool = True) -> Estimate:
    """Predict the cost of one of :data:`WAYS` on one GPU.

    `ieee`: float32 multiplies in IEEE float32 rather than TF32; half types and float64 ignore it.
    """
    return Estimate(way, parts(problem, way), gpu.rates(problem.dtype, ieee))


def backward_workspace(p: Problem) -> Mapping[str, int]:
    """Bytes that each of our backward's two stages holds beyond its inputs and results, as :class:`Problem` has it.

    "factor gradients" holds dY and x of one part of the tokens, where they are gathered, and all partials. They are
    freed before "input gradient", which holds W_eff. Under dropout the first always holds a copy of x, and the second
    the ΔW blocks, dY gathered again, and the adapter's dX by block. What a BLAS library allocates is not counted.
    """
    size, tokens = p.dtype.itemsize, gradient_parts(p)
    rows, cols = p.padded(p.out_features), p.padded(p.in_features)
    dy = max(tokens) * rows * size * p.gathers(p.out_features)
    x = max(tokens) * cols * size * (p.gathers(p.in_features) or p.dropout > 0)
    dx = p.weight_elements * size
    if p.dropout:  # the tokens are one part, so dy is all of dY
        dx = rows * cols // p.num_blocks * size + dy + p.tokens * cols * size
    partials = len(tokens) * partial_bytes(p.features, p.num_blocks, p.max_rank)
    return {"factor gradients": dy + x + partials, "input gradient": dx}


def backward_workspace_bytes(problem: Problem) -> int:
    """Most bytes that the backward holds beyond its inputs and results: those of the larger of its two stages."""
    return max(backward_workspace(problem).values())
