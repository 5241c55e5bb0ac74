"""Published per-multiprocessor limits of the audited architectures, and the occupancy that follows from them.

Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA 3 ISA guide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..checks import check_count, check_kind

__all__ = ["ARCHITECTURES", "Architecture", "occupancy"]

_KIB = 1024


@dataclass(frozen=True)
class Architecture:
    """What one multiprocessor (or compute unit) offers.

    Attributes:
        name: as the compiler spells it.
        tensor_core: mnemonic of the full-rate tensor-core instruction.
        shared_per_block: bytes of shared memory that one block may take.
        shared_per_multiprocessor: bytes that its resident blocks share.
        shared_reserved: bytes that the system takes from each resident block.
        max_warps: resident warps (waves on AMD).
        max_blocks: resident blocks.
        registers: 32-bit registers per thread lane and scheduler, as `registers / lane registers = warps`.
        schedulers: warp schedulers (SIMDs on AMD), each with its own register file.
        register_granule: registers per thread are allocated in multiples of this.
        warp_size: threads per warp.
        async_copies: global loads can go to shared memory without passing registers.

    Example:
        >>> ARCHITECTURES["sm_90"].tensor_core, ARCHITECTURES["gfx942"].is_amd
        ('HGMMA', True)
    """

    name: str
    tensor_core: str
    shared_per_block: int
    shared_per_multiprocessor: int
    max_warps: int
    max_blocks: int
    shared_reserved: int = _KIB
    registers: int = 512
    schedulers: int = 4
    register_granule: int = 8
    warp_size: int = 32
    async_copies: bool = True

    @property
    def is_amd(self) -> bool:
        """Compiled for HIP rather than CUDA."""
        return self.name.startswith("gfx")


_ALL = (
    Architecture("sm_80", "HMMA", 163 * _KIB, 164 * _KIB, max_warps=64, max_blocks=32),
    Architecture("sm_86", "HMMA", 99 * _KIB, 100 * _KIB, max_warps=48, max_blocks=16),
    Architecture("sm_89", "HMMA", 99 * _KIB, 100 * _KIB, max_warps=48, max_blocks=24),
    Architecture("sm_90", "HGMMA", 227 * _KIB, 228 * _KIB, max_warps=64, max_blocks=32),
    Architecture("sm_100", "UTCHMMA", 227 * _KIB, 228 * _KIB, max_warps=64, max_blocks=32),
    Architecture("sm_120", "HMMA", 99 * _KIB, 100 * _KIB, max_warps=48, max_blocks=24),
    Architecture(
        "gfx942",
        "MFMA",
        64 * _KIB,
        64 * _KIB,
        max_warps=32,
        max_blocks=32,
        shared_reserved=0,
        warp_size=64,
        async_copies=False,
    ),
)

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({arch.name: arch for arch in _ALL})
"""Every audited architecture by name."""


def occupancy(arch: Architecture, *, registers: int, shared: int, warps: int) -> int:
    """Blocks that one multiprocessor holds at once; 0 where not even one fits.

    Args:
        arch: one of :data:`ARCHITECTURES`.
        registers: per thread; on AMD vector plus accumulation registers.
        shared: bytes per block.
        warps: per block.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Example:
        >>> occupancy(ARCHITECTURES["sm_90"], registers=128, shared=100 * 1024, warps=8)
        2
    """
    check_kind("arch", arch, Architecture)
    for name, value, least in (("registers", registers, 0), ("shared", shared, 0), ("warps", warps, 1)):
        check_count(name, value, least)
    granules = -(-max(registers, 1) // arch.register_granule)
    warps_per_scheduler = arch.registers // (granules * arch.register_granule)
    resident_warps = min(arch.max_warps, warps_per_scheduler * arch.schedulers)
    by_shared = arch.shared_per_multiprocessor // max(shared + arch.shared_reserved, 1)
    if shared > arch.shared_per_block:
        by_shared = 0
    return min(arch.max_blocks, resident_warps // warps, by_shared)
