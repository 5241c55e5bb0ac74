"""What the cost model knows of GPUs: published rates and bandwidths, and which one stands for a device.

Nothing here is measured by us. A rate, of products or of memory, is a published peak times the share of it that an H100
achieves. The rate of the last cache, of which nobody publishes a peak, is what others measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from types import MappingProxyType

import torch

from ..definition.precision import precision_of
from ..kernels.architectures import gpu_properties

__all__ = [
    "GPUS",
    "Gpu",
    "Rates",
    "device_gpu",
    "match_gpu",
]


@dataclass(frozen=True)
class Rates:
    """How fast a device works: by what the cost model divides.

    Attributes:
        flops_per_second: of a large GEMM.
        bytes_per_second: to and from memory, of a copy.
        cache_bytes_per_second: between the last cache and the multiprocessors.
        instructions_per_second: that one multiprocessor issues to its warps.
        multiprocessors: among which programs are divided.
        start_seconds: that a kernel takes on the device beside its work.
    """

    flops_per_second: float
    bytes_per_second: float
    cache_bytes_per_second: float = math.inf
    instructions_per_second: float = math.inf
    multiprocessors: int = 1
    start_seconds: float = 0.0


@dataclass(frozen=True)
class Gpu:
    """What the model knows of a GPU.

    Attributes:
        name: short lower-case name.
        matmul_tflops: achieved TFLOP/s of a large GEMM by multiplying dtype: "bf16", "fp16", "tf32", "fp32"
            (IEEE), "fp64", as in `precision.PRECISIONS`.
        memory_tbps: published memory bandwidth, TB/s.
        cache_tbps: measured bandwidth of the last cache, TB/s.
        clock_ghz: at which the published rates are reached.
        multiprocessors: streaming multiprocessors or compute units.
        arch: the architecture that kernels are compiled for.
    """

    name: str
    matmul_tflops: Mapping[str, float] = field(hash=False)
    memory_tbps: float
    cache_tbps: float
    clock_ghz: float
    multiprocessors: int
    arch: str

    @property
    def capability(self) -> tuple[int, int] | None:
        """CUDA compute capability; None for AMD."""
        found = re.fullmatch(r"sm_(\d+)(\d)", self.arch)
        return None if found is None else (int(found[1]), int(found[2]))

    def rates(self, dtype: torch.dtype, ieee: bool) -> Rates:
        """What it achieves with operands of `dtype`; float32 multiplies in TF32 unless `ieee`."""
        flops = self.matmul_tflops[precision_of(dtype, ieee).name]
        return Rates(
            flops_per_second=flops * 1e12,
            bytes_per_second=_ACHIEVED_MEMORY * self.memory_tbps * 1e12,
            cache_bytes_per_second=self.cache_tbps * 1e12,
            instructions_per_second=_SCHEDULERS * self.clock_ghz * 1e9,
            multiprocessors=self.multiprocessors,
            start_seconds=_START_SECONDS,
        )


# A large bf16 GEMM on an H100 SXM reaches about 700 of its published 989 dense TFLOP/s. The same share of the
# published rate is assumed for every dtype and GPU until someone measures; AMD's usually reach less.
_ACHIEVED_GEMM = 700 / 989
# A copy on an H100 SXM reaches 2.90 of 3.35 TB/s (github.com/aigatech/vpbenchmarking), on an H100 PCIe and on an A100
# 1.70 and 1.73 of 2.04 (github.com/te42kyfo/gpu-benches, "scale").
_ACHIEVED_MEMORY = 2.90 / 3.35
# A kernel with next to no work in a CUDA graph on an H200 (gpu-benches, "gpu-small-kernels"; on an A100 1.4 µs).
_START_SECONDS = 2.3e-6
_SCHEDULERS = 4  # of a multiprocessor, each of which issues an instruction a clock


def _gpu(
    name: str,
    peak: tuple[float, float, float, float],
    memory_tbps: float,
    cache_tbps: float,
    clock_ghz: float,
    multiprocessors: int,
    arch: str,
) -> Gpu:
    half, tf32, fp32, fp64 = (rate * _ACHIEVED_GEMM for rate in peak)
    rates = {"bf16": half, "fp16": half, "tf32": tf32, "fp32": fp32, "fp64": fp64}
    return Gpu(name, MappingProxyType(rates), memory_tbps, cache_tbps, clock_ghz, multiprocessors, arch)


_PUBLISHED = (
    # name, dense peak TFLOP/s (bf16 and fp16 with fp32 accumulation, TF32, fp32, fp64), memory TB/s, cache TB/s, GHz,
    # multiprocessors. Caches: gpu-benches ("gpu-l2-cache") on an H200, an A100 and an L40, whose chips the H100 and the
    # other Ada GPUs share; chipsandcheese.com on an MI300X; the rest are assumed to have three times memory's rate.
    _gpu("h100", (989, 495, 67, 67), 3.35, 9.7, 1.83, 132, "sm_90"),
    _gpu("h200", (989, 495, 67, 67), 4.8, 9.7, 1.83, 132, "sm_90"),
    _gpu("a100", (312, 156, 19.5, 19.5), 2.04, 5.4, 1.41, 108, "sm_80"),
    _gpu("a40", (150, 75, 37.4, 0.58), 0.696, 2.1, 1.74, 84, "sm_86"),
    _gpu("l40s", (362, 183, 91.6, 1.43), 0.864, 5.2, 2.52, 142, "sm_89"),
    _gpu("rtx4090", (165, 82.6, 82.6, 1.29), 1.008, 5.2, 2.52, 128, "sm_89"),
    _gpu("b200", (2250, 1125, 75, 37), 7.7, 23, 1.85, 148, "sm_100"),
    _gpu("rtx5090", (210, 105, 105, 1.64), 1.792, 5.4, 2.41, 170, "sm_120"),
    _gpu("mi300x", (1307, 654, 163, 163), 5.3, 11.9, 2.1, 304, "gfx942"),
)

GPUS: Mapping[str, Gpu] = MappingProxyType({gpu.name: gpu for gpu in _PUBLISHED})
"""Published figures by name; rates are the published dense peaks times the share that an H100 achieves."""


def match_gpu(
    device_name: str, capability: tuple[int, int] | None, multiprocessors: int | None = None
) -> Gpu:
    """Find the published GPU that stands for a device; always answers.

    By name where the device's own name holds a published one and its multiprocessors agree within 5 %, else
    the published GPU of the nearest capability (or AMD's), scaled by the number of multiprocessors.

    Example:
        >>> match_gpu("NVIDIA H100 80GB HBM3", (9, 0)).name
        'h100'
        >>> match_gpu("a GPU that nobody knows", (8, 0)).name
        'a100'
    """
    for gpu in _PUBLISHED:
        pattern = rf"(?<![a-z0-9]){gpu.name.replace('rtx', 'rtx ?')}(?![a-z0-9])"
        same_size = multiprocessors is None or abs(multiprocessors / gpu.multiprocessors - 1) < 0.05
        if same_size and re.search(pattern, device_name.lower()):
            return gpu
    stand_in = _nearest(capability)
    if multiprocessors is None:
        return stand_in
    share = multiprocessors / stand_in.multiprocessors
    return replace(
        stand_in,
        name=device_name,
        matmul_tflops=MappingProxyType({k: v * share for k, v in stand_in.matmul_tflops.items()}),
        memory_tbps=stand_in.memory_tbps * share,
        cache_tbps=stand_in.cache_tbps * share,
        multiprocessors=multiprocessors,
    )


@cache
def device_gpu(device: torch.device) -> Gpu:
    """Find the published GPU that stands for a device; an H100 stands for Triton's interpreter."""
    if device.type != "cuda":
        return GPUS["h100"]
    properties = gpu_properties(device)
    capability = None if torch.version.hip else (properties.major, properties.minor)
    return match_gpu(properties.name, capability, properties.multi_processor_count)


def _nearest(capability: tuple[int, int] | None) -> Gpu:
    if capability is None:
        return next(gpu for gpu in _PUBLISHED if gpu.capability is None)
    known = [gpu for gpu in _PUBLISHED if gpu.capability is not None]
    # max keeps the first of equals: the table lists the plainest GPU of a capability first.
    at_most = [gpu for gpu in known if gpu.capability is not None and gpu.capability <= capability]
    return max(at_most or known, key=lambda gpu: gpu.capability or (0, 0))
