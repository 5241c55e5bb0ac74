"""What a choice was measured on: the GPU, the software and the kernel's source. On anything else it is stale."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch
import triton

from .architectures import architecture, gpu_properties, multiprocessors

__all__ = ["Identity", "identity", "source_hash", "staleness"]

_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Identity:
    """What a choice was measured on.

    Attributes:
        gpu: as the driver names it; "cpu" for Triton's interpreter.
        capability: compute capability as the compiler spells it, "sm_90" or "gfx942".
        multiprocessors: a slice of a GPU has fewer than its name promises.
        torch: version.
        triton: version.
        source: from :func:`source_hash`.
    """

    gpu: str
    capability: str
    multiprocessors: int
    torch: str
    triton: str
    source: str


@cache
def identity(device: torch.device, kernel: str) -> Identity:
    """Return what a choice for a kernel, or for the algorithm of a stage, would be measured on here and now."""
    return Identity(
        "cpu" if device.type == "cpu" else gpu_properties(device).name,
        architecture(device),
        multiprocessors(device),
        str(torch.__version__),  # a class of its own, which no file holds
        triton.__version__,
        source_hash(kernel),
    )


@cache
def source_hash(kernel: str) -> str:
    """Hash the source that decides the speed of a kernel or an algorithm; how choices are kept is no part of it."""
    from . import KERNELS  # whose modules import the table, and that this one

    # An algorithm is made of all kernels, and of the backend that composes them.
    own = [KERNELS[kernel]] if kernel in KERNELS else KERNELS.values()
    names = ["common.py", *sorted({spec.file for spec in own})]
    paths = [_PACKAGE / "kernels" / name for name in names]
    if kernel not in KERNELS:
        paths.append(_PACKAGE / "backends" / "triton.py")
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:16]


def staleness(then: Identity, now: Identity) -> list[str]:
    """List why a choice measured on `then` does not hold on `now`, one reason a field; empty where it does."""
    return [
        f"{field.name}: {getattr(then, field.name)} then, {getattr(now, field.name)} now"
        for field in fields(Identity)
        if getattr(then, field.name) != getattr(now, field.name)
    ]
