"""What a measured choice was measured on: the GPU, the software and the kernels' source. A change makes it stale."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
import triton

from ..checks import cached, check_choice, check_count, check_kind
from ..cost.gpus import gpu_properties
from .heuristic import ALGORITHM_KEYS, CONFIGS
from .launch import architecture, multiprocessors

__all__ = ["Identity", "identity", "slug", "source_hash", "staleness"]

_PACKAGE = Path(__file__).resolve().parent.parent
_FILES = {name: (name,) for name in CONFIGS} | {
    "modulated_weight": ("modulate",),
    "modulated_blocks": ("modulate",),
    "sum_parts": ("fused_linear",),
    "sum_partials": ("block_grad",),
}


@dataclass(frozen=True)
class Identity:
    """Whose choice it is.

    Attributes:
        gpu: as the driver names it; "cpu" for Triton's interpreter.
        capability: compute capability as the compiler spells it, "sm_90" or "gfx942".
        multiprocessors: a slice of a GPU has fewer than its name promises.
        torch: version.
        triton: version.
        source: hash of the kernel's source text.

    Raises:
        TypeError, ValueError: naming the attribute, what was given and what is allowed.

    Example:
        >>> Identity("NVIDIA H100 80GB HBM3", "sm_90", 132, "2.13.0", "3.9.0", "0123456789abcdef").capability
        'sm_90'
    """

    gpu: str
    capability: str
    multiprocessors: int
    torch: str
    triton: str
    source: str

    def __post_init__(self) -> None:
        for name in ("gpu", "capability", "torch", "triton", "source"):
            check_kind(name, getattr(self, name), str)
        check_count("multiprocessors", self.multiprocessors)

    @classmethod
    def from_json(cls, data: Any) -> Identity:
        """From plain data.

        Raises:
            TypeError, ValueError: a field is missing, unknown or of another type.
        """
        check_kind("data", data, dict)
        found = cls(**data)
        return _IN_USE.setdefault(found, found)


# One object for what a table repeats in every entry, as long as it is in use.
_IN_USE: WeakValueDictionary[Identity, Identity] = WeakValueDictionary()


@cached
def identity(device: torch.device, kernel: str) -> Identity:
    """What a choice for `kernel` would be measured on here and now.

    Args:
        device: where it would run.
        kernel: one of `heuristic.CONFIGS`, or of `heuristic.ALGORITHM_KEYS` for an algorithm.

    Raises:
        TypeError: no device.
        ValueError: another kernel, or a GPU that this machine does not have.

    Example:
        >>> identity(torch.device("cpu"), "permute").gpu
        'cpu'
    """
    check_kind("device", device, torch.device)
    name = "cpu" if device.type == "cpu" else gpu_properties(device).name
    return Identity(
        name,
        architecture(device),
        multiprocessors(device),
        str(torch.__version__),  # a class of its own, which no file holds
        triton.__version__,
        source_hash(kernel),
    )


@cached
def source_hash(kernel: str) -> str:
    """Of the text that decides a kernel's speed: its file and what all share; for an algorithm, of every kernel's.

    Args:
        kernel: as in :func:`identity`.

    Raises:
        ValueError: another one.

    Example:
        >>> len(source_hash("permute")), source_hash("permute") == source_hash("block_grad")
        (16, False)
    """
    check_choice("kernel", kernel, (*CONFIGS, *ALGORITHM_KEYS))
    folder = _PACKAGE / "kernels"
    names = ("common", *_FILES[kernel]) if kernel in _FILES else ()
    paths = [folder / f"{name}.py" for name in names]
    paths = paths or [*sorted(folder.glob("*.py")), _PACKAGE / "backends" / "triton.py"]
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:16]


def staleness(then: Identity, now: Identity) -> list[str]:
    """Why a choice made on `then` does not hold on `now`, one reason a field; empty where it does.

    Args:
        then: when it was measured.
        now: here.

    Raises:
        TypeError: one of them is no identity.

    Example:
        >>> from dataclasses import replace
        >>> now = identity(torch.device("cpu"), "permute")
        >>> staleness(replace(now, multiprocessors=now.multiprocessors + 1), now)[0].split(":")[0]
        'multiprocessors'
    """
    check_kind("then", then, Identity)
    check_kind("now", now, Identity)
    return [
        f"{field.name}: {getattr(then, field.name)} then, {getattr(now, field.name)} now"
        for field in fields(Identity)
        if getattr(then, field.name) != getattr(now, field.name)
    ]


def slug(gpu: str) -> str:
    """A GPU's name as a file name.

    Args:
        gpu: as the driver names it.

    Raises:
        TypeError: it is no string.

    Example:
        >>> slug("NVIDIA H100 80GB HBM3")
        'nvidia-h100-80gb-hbm3'
    """
    check_kind("gpu", gpu, str)
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
