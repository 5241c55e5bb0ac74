"""Public GPUs by name, so that the tuner can list what it would time on one that is not here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """What launch parameters depend on.

    Attributes:
        name: short lower-case name.
        arch: the architecture that kernels are compiled for.
        multiprocessors: streaming multiprocessors or compute units.
    """

    name: str
    arch: str
    multiprocessors: int


_ALL = (
    Gpu("h100", "sm_90", 132),
    Gpu("h200", "sm_90", 132),
    Gpu("a100", "sm_80", 108),
    Gpu("a40", "sm_86", 84),
    Gpu("l40s", "sm_89", 142),
    Gpu("rtx4090", "sm_89", 128),
    Gpu("b200", "sm_100", 148),
    Gpu("rtx5090", "sm_120", 170),
    Gpu("mi300x", "gfx942", 304),
)
GPUS = {gpu.name: gpu for gpu in _ALL}
"""By name."""
