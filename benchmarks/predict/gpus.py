"""Rates of GPUs: a published peak times the share of it that an H100 achieves. We measured none of it."""

from __future__ import annotations

from typing import NamedTuple

# A large bf16 GEMM on an H100 SXM reaches about 700 of its published 989 dense TFLOP/s. The same share of the
# published rate is assumed for every dtype and GPU until someone measures; AMD's usually reach less.
_ACHIEVED_GEMM = 700 / 989
# A copy on an H100 SXM reaches 2.90 of 3.35 TB/s (github.com/aigatech/vpbenchmarking), on an H100 PCIe and on an A100
# 1.70 and 1.73 of 2.04 (github.com/te42kyfo/gpu-benches, "scale").
_ACHIEVED_MEMORY = 2.90 / 3.35
_ACHIEVED_TRITON = 0.8  # of the published bandwidth, by kernels in Triton; an assumption
# A kernel with next to no work in a CUDA graph on an H200 (gpu-benches, "gpu-small-kernels"; on an A100 1.4 µs).
START_SECONDS = 2.3e-6


class Gpu(NamedTuple):
    """Published data of a GPU."""

    name: str
    tflops: tuple[
        float, float, float, float
    ]  # dense: bf16 and fp16 (with fp32 accumulation), TF32, IEEE fp32, fp64
    memory_tbps: float
    multiprocessors: int  # or compute units
    arch: str  # that kernels are compiled for
    memory_gb: int  # 10⁹ bytes

    def flops_per_second(self, precision: str) -> float:
        """The rate that a large GEMM achieves in one of `precision.PRECISIONS`."""
        half, tf32, fp32, fp64 = self.tflops
        peaks = {"bf16": half, "fp16": half, "tf32": tf32, "fp32": fp32, "fp64": fp64}
        return _ACHIEVED_GEMM * peaks[precision] * 1e12

    def bytes_per_second(self, *, triton: bool = False) -> float:
        """The rate that a copy, or a kernel in Triton, achieves to and from memory."""
        return (_ACHIEVED_TRITON if triton else _ACHIEVED_MEMORY) * self.memory_tbps * 1e12


_ALL = (
    Gpu("h100", (989, 495, 67, 67), 3.35, 132, "sm_90", 80),
    Gpu("h200", (989, 495, 67, 67), 4.8, 132, "sm_90", 141),
    Gpu("a100", (312, 156, 19.5, 19.5), 2.04, 108, "sm_80", 80),
    Gpu("a40", (150, 75, 37.4, 0.58), 0.696, 84, "sm_86", 48),
    Gpu("l40s", (362, 183, 91.6, 1.43), 0.864, 142, "sm_89", 48),
    Gpu("rtx4090", (165, 82.6, 82.6, 1.29), 1.008, 128, "sm_89", 24),
    Gpu("b200", (2250, 1125, 75, 37), 7.7, 148, "sm_100", 180),
    Gpu("rtx5090", (210, 105, 105, 1.64), 1.792, 170, "sm_120", 32),
    Gpu("mi300x", (1307, 654, 163, 163), 5.3, 304, "gfx942", 192),
)
GPUS = {gpu.name: gpu for gpu in _ALL}
"""By name."""
