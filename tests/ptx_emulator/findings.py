"""The kinds of findings of the emulator and their meanings. Our kernels must have no errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import triton

from smoa_kernels.backends import miscompiled

from . import ARCH

LACKS_FENCES = miscompiled(10, "bf16", triton.__version__) is not None
"""Whether this Triton leaves out fences between copies to shared memory and products that read it."""
OVERWRITES_OPERANDS = miscompiled(ARCH // 10, "tf32", triton.__version__) is not None
"""Whether this Triton overwrites the left operand of a wgmma under way, so that no TF32 runs on the GPU."""

ERRORS: Mapping[str, str] = MappingProxyType(
    {
        # Global memory
        "outside_storage": "an access past the end of an argument's storage, or before its start",
        "outside_view": "an access to a byte that the storage has and the argument's view has not",
        "not_an_argument": "an access to an address that is in no argument",
        "misaligned": "an access that is not aligned to its own width",
        "poison_read": "a load of memory that nobody wrote: all bits of a floating element are one",
        "lanes_global_write_write": "two lanes write two values to one place in one store",
        "cta_write_write": "two programs write two values to one byte",
        "cta_read_after_write": "a program reads what another one wrote",
        "cta_write_after_read": "a program writes what another one has read",
        # Shared memory
        "shared_outside": "an access past the launch's shared memory",
        "shared_misaligned": "an access that is not aligned to its own width",
        "shared_uninit": "a read of a byte that was never written",
        "shared_in_flight": "an access to what an asynchronous copy has yet to deliver",
        "race_read_after_write": "a warp reads what another one wrote, with no barrier between",
        "race_write_after_read": "a warp writes what another one has read, with no barrier between",
        "race_write_write": "two warps write two values, with no barrier between",
        "warp_unsynced": "a lane reads what another lane of its warp wrote, with no barrier between",
        "lanes_write_write": "two lanes write two values to one place in one store",
        "divergent_sync": "a part of a warp meets a barrier, a shuffle, an mma or an ldmatrix",
        # Warpgroup products (sm_90)
        "wgmma_register": "an accumulator of a wgmma under way is touched, or a register of its left operand written",
        "wgmma_unfenced": "no wgmma.fence since something else touched the wgmma's registers",
        "wgmma_overwrite": "a store or the start of a copy to shared memory that a wgmma under way reads",
        "wgmma_proxy": "a wgmma reads what stores wrote, with no fence.proxy.async between",
        "wgmma_proxy_copy": "a wgmma reads what cp.async wrote, with no fence.proxy.async between",
        "wgmma_divergent": "warps of a warpgroup, or lanes of a warp, that differ in what they multiply",
        "wgmma_descriptor": "reserved bits of a matrix descriptor are set",
        "wgmma_not_waited": "a wgmma that nothing waits for",
    }
)
NOTES: Mapping[str, str] = MappingProxyType(
    {
        "duplicate_store": "a program writes a place twice",
        "cta_same_value_write": "two programs write one value to one byte",
        "same_value_write_write": "two warps write one value to one byte of shared memory, with no barrier between",
        "exit_before_barrier": "a warp ends while others wait at a barrier",
        "wgmma_operand_read": "a register of the left operand of a wgmma under way is read (the manual forbids it)",
    }
)
"""Reported, but not errors."""
ALLOWED: Mapping[str, str] = MappingProxyType(
    {
        "wgmma_proxy_copy": "a Triton before 3.7.1 leaves the fence out (triton#9610); docs/gpu.md says what follows"
    }
    if LACKS_FENCES
    else {}
)
"""Errors that every kernel has by this Triton, with the reason. They are reported, and no test fails for them."""


@dataclass(frozen=True)
class Finding:
    """A finding at one instruction of one launch.

    Attributes:
        kind: one of `ERRORS` or `NOTES`.
        kernel: the function's name.
        line: the source line, "permute.py:79".
        instruction: the PTX.
        count: how many times.
        example: one occurrence: where, by which thread, how wide.
    """

    kind: str
    kernel: str
    line: str
    instruction: str
    count: int
    example: str

    @property
    def is_error(self) -> bool:
        return self.kind in ERRORS and self.kind not in ALLOWED

    def __str__(self) -> str:
        where = f"{self.kernel} ({self.line})"
        return f"{self.kind} ×{self.count} in {where}: {self.instruction}\n    {self.example}"
