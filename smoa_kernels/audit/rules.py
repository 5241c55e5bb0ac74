"""The record of one compiled configuration and the rules that it must meet. Pure: no compiler, no files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..kernels.architectures import ARCHITECTURES

__all__ = ["Record", "Role", "Traffic", "broken_rules"]

Role = Literal["matmul", "gather", "copy"]

WIDE_BITS = 128


@dataclass(frozen=True)
class Traffic:
    """Global-memory instructions of one kind in one place of the binary.

    Attributes:
        pointer: parameter names it goes through, joined by "|"; "?" where the listing does not tell.
        kind: "load" or "store".
        bits: per thread; 0 for bulk copies.
        asynchronous: straight to shared memory.
        in_main_loop: inside the loop that multiplies.
        count: how many such instructions.
    """

    pointer: str
    kind: str
    bits: int
    asynchronous: bool
    in_main_loop: bool
    count: int


@dataclass(frozen=True)
class Record:
    """What one kernel at one configuration compiles to on one architecture.

    Attributes:
        kernel: name of the kernel.
        variant: which of its constexpr paths.
        role: "matmul", "gather" or "copy".
        config: the launch parameters.
        arch: for example "sm_90".
        dtype: "bf16", "fp16", "tf32" or "fp32" (IEEE).
        registers: per thread.
        spilled: bytes per thread.
        stack: bytes per thread.
        shared: bytes per block.
        warps: per block.
        blocks_per_multiprocessor: from the published limits.
        binary_bytes: size of the device binary.
        instructions: of a warp, in the listing.
        loop_instructions: of these, in the main loop.
        tensor_cores: class to count of tensor-core instructions in the main loop.
        traffic: global-memory instructions.
        narrow: pointers that may be accessed below 128 bits, each with its reason.
        error: why it did not compile; nothing else then counts.
    """

    kernel: str
    variant: str
    role: Role
    config: Mapping[str, Any]
    arch: str
    dtype: str
    registers: int = 0
    spilled: int = 0
    stack: int = 0
    shared: int = 0
    warps: int = 0
    blocks_per_multiprocessor: int = 0
    binary_bytes: int = 0
    instructions: int = 0
    loop_instructions: int = 0
    tensor_cores: Mapping[str, int] = field(default_factory=dict)
    traffic: tuple[Traffic, ...] = ()
    narrow: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data; :meth:`from_json` is its inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """Rebuild from :meth:`to_json`."""
        return cls(**{**data, "traffic": tuple(Traffic(**entry) for entry in data["traffic"])})

    @property
    def main_loop_loads(self) -> Counter[tuple[int, bool]]:
        """(bits, asynchronous) to count, of wide operands only."""
        loads: Counter[tuple[int, bool]] = Counter()
        for entry in self.traffic:
            if entry.in_main_loop and entry.kind == "load" and not _may_be_narrow(self, entry):
                loads[entry.bits, entry.asynchronous] += entry.count
        return loads


def broken_rules(record: Record) -> tuple[str, ...]:
    """The rules that a record breaks, in words; empty when it may ship.

    1. It compiles; no spills, no stack, no local memory.
    2. Shared memory within the architecture's limit, and at least one block fits a multiprocessor.
    3. In matmul kernels the main loop multiplies on the architecture's full-rate tensor cores for bf16, fp16 and
       tf32, and its loads are 128 bits wide and, on NVIDIA, asynchronous. Loops in IEEE float32 have no tensor
       cores on NVIDIA; their loads obey the same rule.
       Nothing is asked of the loads of gather kernels, which multiply what they read one number at a time.
    4. In copy kernels every access is 128 bits wide.

    Rules 3 and 4 spare the pointers that the kernel declares narrow, each with its reason.
    """
    if record.error is not None:
        return (f"does not compile: {record.error}",)
    arch = ARCHITECTURES[record.arch]
    broken = []
    if record.spilled:
        broken.append(f"spills {record.spilled} bytes")
    if record.stack:
        broken.append(f"stack of {record.stack} bytes")
    if record.shared > arch.shared_per_block:
        broken.append(f"shared memory {record.shared} above {arch.shared_per_block} bytes")
    elif record.blocks_per_multiprocessor < 1:
        broken.append("not one block fits a multiprocessor")
    if record.role != "copy":
        broken += _matmul_rules(record)
    else:
        broken += _width_rules(record, [t for t in record.traffic if not _may_be_narrow(record, t)])
    return tuple(broken)


def _matmul_rules(record: Record) -> list[str]:
    arch = ARCHITECTURES[record.arch]
    broken = []
    if (record.dtype != "fp32" or arch.is_amd) and not record.tensor_cores.get(arch.tensor_core):
        found = ", ".join(record.tensor_cores) or "no tensor cores"
        broken.append(f"{found} in the main loop, not {arch.tensor_core}")
    if record.role == "gather":
        return broken
    loads = [
        t for t in record.traffic if t.in_main_loop and t.kind == "load" and not _may_be_narrow(record, t)
    ]
    if not loads:
        broken.append("no loads of wide operands found in the main loop")
    broken += _width_rules(record, loads)
    if arch.async_copies and not all(entry.asynchronous for entry in loads):
        names = sorted({entry.pointer for entry in loads if not entry.asynchronous})
        broken.append(f"main-loop loads of {', '.join(names)} are not asynchronous")
    return broken


def _width_rules(record: Record, entries: list[Traffic]) -> list[str]:
    return [
        f"{entry.count} {entry.kind}s of {entry.bits} bits through {entry.pointer}"
        for entry in entries
        if 0 < entry.bits < WIDE_BITS
    ]


def _may_be_narrow(record: Record, entry: Traffic) -> bool:
    return all(pointer in record.narrow for pointer in entry.pointer.split("|"))
