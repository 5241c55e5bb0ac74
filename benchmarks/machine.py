"""The machine of a run: device, versions, threads."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .protocol import DEVICE

LIMIT = "ONEDNN_MAX_CPU_ISA"  # this variable limits the instructions of torch's half-precision GEMMs
EDITED = "+"  # appended to a commit if some changes of code were not committed
PACKAGES = ("torch", "triton", "peft", "transformers", "smoa-kernels")


def describe(smoke: bool) -> dict[str, Any]:
    """The machine and the versions that a figure depends on, as JSON holds them."""
    gpu = DEVICE.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if gpu else cpu_name(),
        "measured_on": "GPU" if gpu else "CPU",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "smoke": smoke,
    }


def commit() -> str:
    """The checkout's commit, with `EDITED` appended if code is not committed; "unknown" if git fails.

    Changes in benchmarks/results do not count.
    """
    try:
        changed = _git("status", "--porcelain", "-uno", "--", ":/", ":(exclude,top)benchmarks/results")
        return _git("rev-parse", "--short=10", "HEAD") + (EDITED if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    here = Path(__file__).parent
    return subprocess.run(
        ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
    ).stdout.strip()


def load() -> float:
    """Processes that ran or waited in the last minute; 0 if the system does not count them."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, with its family and model numbers if the system gives them, and its limits."""
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", text, re.MULTILINE))
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    # Virtual machines give many processors one name, and some are twice as fast as others.
    numbers = [
        f"{field.removeprefix('cpu ')} {fields[field]}"
        for field in ("cpu family", "model")
        if field in fields
    ]
    # Limited instructions make half-precision GEMMs slower, so such a run must not replace one without the limit.
    limits = [f"{LIMIT}={os.environ[LIMIT]}"] if LIMIT in os.environ else []
    return ", ".join([fields["model name"].strip(), *numbers, *limits])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
