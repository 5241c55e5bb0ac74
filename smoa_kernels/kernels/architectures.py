"""One table of GPU architectures with their published limits; a device's architecture, and its identity.

Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA 3 ISA guide.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..checks import first_line

_KIB = 1024


@dataclass(frozen=True)
class Architecture:
    """The limits of a multiprocessor (or compute unit)."""

    name: str  # as the compiler spells it
    tensor_core: str  # mnemonic of the full-rate tensor-core instruction
    shared_per_block: int  # bytes of shared memory that a block may take
    warp_size: int = 32  # threads per warp
    fused_tokens: int = 64  # most tokens of a half type that "auto" gives to `fused_linear`
    same: tuple[str, ...] = ()  # architectures that are not audited and have at least these limits

    @property
    def is_amd(self) -> bool:
        """Whether kernels are compiled for HIP, not for CUDA."""
        return self.name.startswith("gfx")


_AUDITED = (
    Architecture("sm_80", "HMMA", 163 * _KIB),
    Architecture("sm_86", "HMMA", 99 * _KIB),
    Architecture("sm_89", "HMMA", 99 * _KIB),
    Architecture("sm_90", "HGMMA", 227 * _KIB),
    Architecture("sm_100", "UTCHMMA", 227 * _KIB, fused_tokens=16, same=("sm_103",)),
    Architecture("sm_120", "HMMA", 99 * _KIB, same=("sm_121",)),
    Architecture("gfx942", "MFMA", 64 * _KIB, warp_size=64, same=("gfx90a", "gfx950")),
)
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({arch.name: arch for arch in _AUDITED})
"""Every audited architecture by name."""

# Names for rows of configurations (`spec.Row`).
AMPERE, ADA, HOPPER, BLACKWELL = ("sm_80",), ("sm_86", "sm_89"), ("sm_90",), ("sm_100",)
GEFORCE_BLACKWELL, AMD = ("sm_120",), ("gfx942",)

_BY_NAME = {name: arch for arch in _AUDITED for name in (arch.name, *arch.same)}
ON_AMD = tuple(sorted(name for name, arch in _BY_NAME.items() if arch.is_amd))
"""AMD's architectures that the kernels run on; on others, such as RDNA's, they spill registers."""


def limits(name: str) -> Architecture:
    """The row of an architecture; for an unknown name, limits that every GPU has."""
    return _BY_NAME.get(name) or Architecture(name, "HMMA", 48 * _KIB)


@cache
def architecture(device: torch.device) -> str:
    """Name a device's architecture as the compiler spells it: "sm_90", "gfx942"; "cpu" for the interpreter."""
    return "cpu" if device.type == "cpu" else architecture_of(gpu_properties(device))


def architecture_of(properties: Any) -> str:
    """Name the architecture of a GPU with these properties."""
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@cache
def multiprocessors(device: torch.device) -> int:
    """Count a device's multiprocessors (compute units); 1 where there are none."""
    return 1 if device.type != "cuda" else int(gpu_properties(device).multi_processor_count)


@cache
def assembler(arch: str) -> str:
    """Name the assembler that Triton takes for an architecture, "ptxas 12.8.93"; "no ptxas" if not NVIDIA's."""
    if not arch.startswith("sm_"):
        return "no ptxas"
    with suppress(Exception):  # no Triton, no ptxas, or another function in this Triton
        from triton.backends.nvidia.compiler import get_ptxas_version

        if version := re.search(r"\bV([\d.]+)", get_ptxas_version(int(arch.removeprefix("sm_")))):
            return f"ptxas {version[1]}"
    return "ptxas of unknown version"


def gpu_name(device: torch.device) -> str:
    """A GPU's name by its driver; "cpu" for the interpreter."""
    return "cpu" if device.type == "cpu" else str(gpu_properties(device).name)


@cache
def identity(device: torch.device) -> str:
    """The GPU and the software on which choices are measured and kernels verified; elsewhere both are stale.

    A slice of a GPU has fewer multiprocessors than its name promises.
    """
    import triton  # here, because tables can be read without Triton

    arch = architecture(device)
    gpu = f"{gpu_name(device)}, {arch}, {multiprocessors(device)} multiprocessors"
    return f"{gpu}, Triton {triton.__version__}, {assembler(arch)}, kernels {source_hash()}"


@cache
def source_hash() -> str:
    """Hash every file that may change the speed of a kernel or an algorithm."""
    folder = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in (*sorted(folder.glob("*.py")), folder.parent / "backends" / "triton.py"):
        digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:16]


def gpu_properties(device: torch.device) -> Any:
    """Ask the driver about a CUDA or ROCm GPU. Raises a ValueError if this machine does not have it."""
    try:
        return torch.cuda.get_device_properties(device)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"device must be a CUDA or ROCm GPU that this machine has, got {str(device)!r}: {first_line(error)}"
        ) from error
