"""The record of one compiled configuration and the rules that it must meet. Pure: no compiler, no files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from smoa_kernels.kernels.architectures import ARCHITECTURES, Architecture

WIDE_BITS = 128
UNKNOWN = "?"
"""A pointer that the listing does not identify."""


@dataclass(frozen=True)
class Traffic:
    """Global-memory instructions of one kind in one place of the binary.

    Attributes:
        pointer: names of the parameters it goes through, joined by "|", or `UNKNOWN`.
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
    """The result of compiling one kernel at one configuration for one architecture.

    Registers (on AMD vector and accumulation registers together) and bytes of spills and stack (spills included) are
    per thread, bytes of shared memory per block. `early_writes` counts writes to a wgmma's left operand before its
    wait, `key` is a hash of the source and the launch. If there is an `error`, the other fields mean nothing.
    """

    kernel: str
    form: str
    role: str
    config: Mapping[str, Any]
    arch: str
    dtype: str
    registers: int = 0
    spilled: int = 0
    stack: int = 0
    shared: int = 0
    tensor_cores: Mapping[str, int] = field(default_factory=dict)  # in the main loop
    traffic: tuple[Traffic, ...] = ()
    narrow: Mapping[str, str] = field(default_factory=dict)
    early_writes: int = 0
    key: str = ""
    error: str | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """Rebuild from the JSON of its fields."""
        return cls(**{**data, "traffic": tuple(Traffic(**entry) for entry in data["traffic"])})

    @property
    def group(self) -> str:
        """The kernel and architecture."""
        return f"{self.kernel} {self.arch}"

    @property
    def name(self) -> str:
        """The kernel, form, configuration, architecture and dtype."""
        config = " ".join(
            f"{name.removeprefix('block_').removeprefix('num_')}={v}" for name, v in self.config.items()
        )
        return f"{self.kernel} {self.form}, {self.arch} {self.dtype}, {config}"


def broken_rules(record: Record) -> tuple[str, ...]:
    """The rules that a record breaks, as messages; empty if it may ship.

    1. It compiles; no spills, no stack, no local memory.
    2. Shared memory within the architecture's limit. Compilers themselves keep registers within a block's.
    3. In matmul kernels the main loop multiplies on the architecture's full-rate tensor cores for bf16, fp16 and
       tf32, and its loads are 128 bits wide and, on NVIDIA, asynchronous. Loops in IEEE float32 have no tensor
       cores on NVIDIA; their loads obey the same rule.
       Loads of gather kernels are exempt: these kernels multiply single numbers as they read them.
    4. In copy kernels every access is 128 bits wide.
    5. No register of a wgmma's left operand is written before its wait.

    Rules 3 and 4 spare the pointers that the kernel declares narrow, each with its reason, and on AMD the few accesses
    whose pointer is unknown.
    """
    if record.error is not None:
        return (f"does not compile: {record.error}",)
    arch = ARCHITECTURES[record.arch]
    judged = [entry for entry in record.traffic if not _is_spared(record, entry, arch)]
    broken = []
    if record.spilled:
        broken.append(f"spills {record.spilled} bytes")
    if record.stack:
        broken.append(f"stack of {record.stack} bytes")
    if record.shared > arch.shared_per_block:
        broken.append(f"shared memory {record.shared} above {arch.shared_per_block} bytes")
    if record.early_writes:
        broken.append(f"{record.early_writes} writes to a wgmma's left operand before its wait")
    if record.role == "copy":
        return (*broken, *_narrow(judged))
    if (record.dtype != "fp32" or arch.is_amd) and not record.tensor_cores.get(arch.tensor_core):
        found = ", ".join(record.tensor_cores) or "no tensor cores"
        broken.append(f"{found} in the main loop, not {arch.tensor_core}")
    if record.role == "gather":
        return tuple(broken)
    loads = [entry for entry in judged if entry.in_main_loop and entry.kind == "load"]
    if not loads and "x_ptr" not in record.narrow:
        broken.append("no loads of wide operands found in the main loop")
    broken += _narrow(loads)
    if not arch.is_amd and not all(entry.asynchronous for entry in loads):
        names = sorted({entry.pointer for entry in loads if not entry.asynchronous})
        broken.append(f"main-loop loads of {', '.join(names)} are not asynchronous")
    return tuple(broken)


def _narrow(entries: list[Traffic]) -> list[str]:
    return [
        f"{entry.count} {entry.kind}s of {entry.bits} bits through {entry.pointer}"
        for entry in entries
        if 0 < entry.bits < WIDE_BITS
    ]


def _is_spared(record: Record, entry: Traffic, arch: Architecture) -> bool:
    if entry.pointer == UNKNOWN:
        return arch.is_amd
    return all(pointer in record.narrow for pointer in entry.pointer.split("|"))
