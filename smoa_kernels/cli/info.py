"""`smoa-kernels info`: what a bug report needs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from .._version import __version__
from ..tuning.audit import cache_folder
from .output import console, write_json

__all__ = ["backends", "info"]

_PACKAGES = ("torch", "triton", "numpy", "peft", "transformers", "typer", "rich")
_VARIABLES = ("SMOA_", "TRITON_", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def backends() -> dict[str, str | None]:
    """Backend to the reason why it does not work here, None where it does."""
    return {"eager": None, "triton": _why_not_triton()}


def _why_not_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} has a compute capability below 8.0"
    return None


def info(json: Annotated[Path | None, typer.Option(help="Write the same as JSON.")] = None) -> None:
    """Versions, devices, and which backends work here."""
    found = _collect()
    table = Table(show_header=False)
    for section, entries in found.items():
        for name, value in entries.items():
            table.add_row(section, name, value)
    console().print(table)
    if json is not None:
        write_json(json, found)


def _collect() -> dict[str, dict[str, str]]:
    return {
        "versions": {
            "smoa-kernels": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "devices": _devices(),
        "backends": {name: f"no: {why}" if why else "works" for name, why in backends().items()},
        "folders": {"cache": str(cache_folder())},
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    devices = {"cpu": f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties: Any = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = (
            f"{properties.name}, capability {properties.major}.{properties.minor}, "
            f"{properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB"
        )
    return devices
