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
from rich.markup import escape
from rich.table import Table

from .._version import __version__
from ..backends import triton_obstacle
from ..files import cache_folder
from .output import console, write_json

__all__ = ["backends", "info"]

_PACKAGES = ("torch", "triton", "numpy", "peft", "transformers", "typer", "rich")
_OURS = ("SMOA_AUTOTUNE", "SMOA_CACHE")
_VARIABLES = (
    "SMOA_",
    "TRITON_",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "NVIDIA_TF32_OVERRIDE",
    "XDG_CACHE_HOME",
)


def backends() -> dict[str, str | None]:
    """Backend to the reason why it does not work here, None where it does."""
    return {"eager": None, "reference": None, "triton": _why_not_triton()}


def _why_not_triton() -> str | None:
    if torch.cuda.is_available():
        return triton_obstacle(torch.device("cuda", torch.cuda.current_device()))
    obstacle = triton_obstacle(torch.device("cpu"))
    if obstacle is not None and obstacle.startswith("x is on the CPU"):
        return "no CUDA or ROCm device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return obstacle


def info(json: Annotated[Path | None, typer.Option(help="Write the same as JSON.")] = None) -> None:
    """What a bug report needs: versions, devices, backends, tuning tables, folders, environment."""
    found = _collect()
    table = Table(show_header=False)
    for section, entries in found.items():
        for name, value in entries.items():
            table.add_row(section, escape(name), escape(value))
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
        "tuning tables": _tables(),
        "folders": {"cache": str(cache_folder())},
        "environment": dict.fromkeys(_OURS, "not set")
        | {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
    }


def _tables() -> dict[str, str]:
    if importlib.util.find_spec("triton") is None:
        return {"none": "triton is not installed"}
    from ..tuning.status import table_states  # imports Triton

    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return table_states(devices) or {"none": "no GPU here, and no table on disk"}


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
