"""Makes smoa_kernels treat CPU tensors as a GPU's. No other file fakes anything."""

from __future__ import annotations

import sys

from smoa_kernels import backends
from smoa_kernels.kernels import architectures
from smoa_kernels.tuning.gpus import GPUS, Gpu

from . import emulator

__all__ = ["pretend"]


def pretend(arch: int) -> Gpu:
    """Let the CPU act as a GPU of `sm_<arch>` for the rest of this process: kernels compile for it and are emulated.

    Returns:
        The GPU.

    Raises:
        RuntimeError: the kernels were imported before this call.
    """
    if "smoa_kernels.kernels.spec" in sys.modules:
        raise RuntimeError("the kernels must be imported after this")
    emulator.activate(arch)
    gpu = next(gpu for gpu in GPUS.values() if gpu.arch == f"sm_{arch}")
    for name, answer in {"architecture": gpu.arch, "multiprocessors": gpu.multiprocessors}.items():
        setattr(architectures, name, lambda device, answer=answer: answer)
    backends._device_obstacle = lambda device: None  # type: ignore[assignment]
    return gpu
