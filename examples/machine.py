"""What a run was measured on."""

import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch

import smoa_kernels


def describe(device: torch.device) -> dict[str, str | int]:
    """Return the machine and the versions that a measurement depends on."""
    machine: dict[str, str | int] = {
        "label": "measured on CPU" if device.type == "cpu" else "measured on GPU",
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    return (
        machine | {"python": platform.python_version(), "smoa_kernels": smoa_kernels.__version__} | versions
    )


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def peak_memory_bytes(device: torch.device) -> int:
    """Return the high-water mark so far: of the accelerator's memory, or of this process' resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows, where the rest of this example may still run on a GPU

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
