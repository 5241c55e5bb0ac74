"""The machine of a run."""

import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path

import torch


def describe(device: torch.device) -> dict[str, str | int]:
    """Return the machine and the versions that a measurement depends on."""
    packages = ("torch", "transformers", "peft", "smoa-kernels")
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(
        r"^model name\s*: (.*)$", cpuinfo.read_text() if cpuinfo.is_file() else "", re.MULTILINE
    )
    return {
        "label": "measured on CPU" if device.type == "cpu" else "measured on GPU",
        "platform": platform.platform(),
        "cpu": named[1] if named else platform.processor(),
        "threads": torch.get_num_threads(),
        **({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
        "python": platform.python_version(),
        **{name.replace("-", "_"): version(name) for name in packages},
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Return the high-water mark so far: of the accelerator's memory, or of this process' resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # missing on Windows; a run on a GPU does not need it

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
