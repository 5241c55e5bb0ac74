"""Launches: passes a compiled kernel and its arguments to the machine, and returns findings and counts.

emulator.activate(80)               # before a kernel is launched, with TRITON_INTERPRET unset
kernel[grid](...)                   # on CPU tensors
emulator.launches[-1].errors        # the checks' errors
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import struct
import time
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from . import driver, ptx
from .driver import Argument, Kernel
from .findings import Finding
from .library import Job, Region, Report, Stat, library

REPORTS = 4096
PAGE = 4096
NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE, which not every supported Python names


class EmulationError(Exception):
    """The machine stopped: the kernel did something undefined."""


@dataclass(frozen=True)
class Launch:
    """The results of one launch.

    Attributes:
        kernel: the kernel's name.
        grid: programs along x, y and z.
        program: its PTX, translated for the machine.
        stats: a `library.Stat` for each instruction, as an array with named fields.
        findings: errors and notes.
        seconds: the machine's run time.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    program: ptx.Program
    stats: np.ndarray
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.is_error]


launches: list[Launch] = []
"""All launches so far; the reader clears the list."""


def activate(arch: int) -> None:
    """Make Triton compile for `sm_<arch>` and launch in the emulator."""
    library()
    driver.install(arch, launch)


@functools.cache
def program_of(text: str) -> ptx.Program:
    """PTX translated for the machine."""
    machine = library()
    return ptx.parse(text, machine.operations, machine.shared_base)


def launch(kernel: Kernel, grid: tuple[int, int, int], arguments: list[Argument]) -> None:
    """Run a kernel over a grid and append to `launches`.

    Raises:
        EmulationError: the machine does not support the kernel or an argument, or it stopped.
        ptx.UnsupportedError: the machine does not support an instruction.
    """
    machine, program = library(), program_of(kernel.ptx)
    if program.threads != kernel.num_warps * 32:
        raise EmulationError(f"{program.threads} threads in {kernel.num_warps} warps")
    memory = _Memory(arguments)
    parameters = _parameters(program, arguments, memory.addresses)
    size = len(program.code)
    stats = np.zeros(size, Stat)
    kind_counts = np.zeros((len(machine.kinds), size), np.uint64)
    reports = (Report * REPORTS)()
    job = Job(
        code=ctypes.addressof(program.code),
        size=size,
        register_bytes=program.register_bytes,
        predicates=program.predicates,
        registers=program.initial.ctypes.data,
        initial_predicates=program.initial_predicates.ctypes.data,
        special=program.special.ctypes.data,
        extra=program.extra.ctypes.data,
        grid=grid,
        threads=program.threads,
        shared_size=kernel.shared,
        parameters=parameters.ctypes.data,
        regions=ctypes.addressof(memory.regions),
        region_count=len(memory.names),
        hopper=kernel.arch == 90,
        wgmma=program.has_wgmma,
        stats=stats.ctypes.data,
        reports=ctypes.addressof(reports),
        most_reports=REPORTS,
        kind_counts=kind_counts.ctypes.data,
    )
    begin = time.perf_counter()
    failed = machine.launch(ctypes.byref(job))
    seconds = time.perf_counter() - begin
    examples: dict[tuple[int, int], str] = {}
    for report in reports[: job.report_count]:
        examples.setdefault((report.kind, report.pc), memory.describe(report))
    findings = tuple(
        Finding(
            machine.kinds[kind],
            kernel.name,
            program.lines[pc],
            program.texts[pc],
            int(kind_counts[kind, pc]),
            examples.get((kind, pc), ""),
        )
        for kind, pc in zip(*np.nonzero(kind_counts), strict=True)
    )
    launches.append(Launch(kernel, grid, program, stats, findings, seconds))
    if failed:
        raise EmulationError(f"{kernel.name}: {job.error.decode()}; {'; '.join(map(str, findings))}")


class _Memory:
    """The tensor arguments, at addresses 2^40 apart, so that none follows the end of another.

    The low 12 bits are those of the real address, which keeps the alignment.
    """

    def __init__(self, arguments: list[Argument]) -> None:
        tensors = {a.name: a.value for a in arguments if isinstance(a.value, Tensor)}
        self.names = list(tensors)
        self.regions = (Region * max(len(tensors), 1))()
        self.addresses: dict[str, int] = {}
        self._arrays: list[np.ndarray] = []  # keeps the regions' memory alive
        last_access: dict[int, tuple[int, int]] = {}  # by storage, since two arguments may share one
        for number, (name, tensor) in enumerate(tensors.items(), 1):
            if tensor.device.type != "cpu":
                raise EmulationError(f"{name} is on {tensor.device}")
            storage = tensor.untyped_storage()
            base, size = storage.data_ptr(), storage.nbytes()
            if base not in last_access:
                last_access[base] = self._zeros(size, np.uint32), self._zeros(size, np.uint32)
            start = (number << 40) + (1 << 20) + base % PAGE
            element = tensor.element_size()
            poison = element if tensor.is_floating_point() and element in (2, 4) else 0
            self.regions[number - 1] = Region(
                start, size, base, self._in_view(tensor, size), *last_access[base], poison
            )
            # An empty tensor has the null address.
            self.addresses[name] = start + tensor.data_ptr() - base if tensor.data_ptr() else 0

    def _zeros(self, count: int, dtype: type) -> int:
        """The address of zeros. Untouched pages cost nothing, however many there are."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
        memory = mmap.mmap(-1, max(count, 1) * np.dtype(dtype).itemsize, flags=flags)
        array: np.ndarray = np.frombuffer(memory, dtype)
        self._arrays.append(array)
        return array.ctypes.data

    def _in_view(self, tensor: Tensor, size: int) -> int:
        """The address of one flag per byte of the storage: whether it belongs to an element of the view."""
        address = self._zeros(size, np.uint8)
        if tensor.numel():
            item = tensor.element_size()
            elements = self._arrays[-1][: size // item * item].reshape(-1, item)
            index = np.array(tensor.storage_offset())
            for extent, stride in zip(tensor.shape, tensor.stride(), strict=True):
                index = index[..., None] + np.arange(extent) * stride
            elements[index.reshape(-1)] = 1
        return address

    def describe(self, report: Report) -> str:
        named = 0 < report.region <= len(self.names)
        where = f"{self.names[report.region - 1] if named else 'shared memory'}+{report.address}"
        who = f"program {report.cta}, warp {report.warp}, lane {report.lane}"
        return f"{report.width} bytes at {where}, {who}, other: {report.other}"


def _parameters(program: ptx.Program, arguments: list[Argument], addresses: dict[str, int]) -> np.ndarray:
    """The kernel's parameters as laid out in memory. Triton adds two for scratch memory, which is not used."""
    if len(program.parameters) != len(arguments) + 2:
        raise EmulationError(f"{len(program.parameters)} parameters for {len(arguments)} arguments")
    buffer = np.zeros(program.parameter_bytes, np.uint8)
    for argument, parameter in zip(arguments, program.parameters, strict=False):
        if argument.name in addresses:
            data = struct.pack("<Q", addresses[argument.name])
        elif argument.kind == "fp32":
            data = struct.pack("<f", argument.value)
        elif argument.kind[0] in "iu":
            data = (int(argument.value) % (1 << 8 * parameter.size)).to_bytes(parameter.size, "little")
        else:
            raise EmulationError(f"argument {argument.name} of type {argument.kind}")
        if len(data) != parameter.size:
            raise EmulationError(f"argument {argument.name}: {len(data)} bytes for {parameter.size}")
        buffer[parameter.offset : parameter.offset + parameter.size] = list(data)
    return buffer
