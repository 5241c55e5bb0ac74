"""Ahead-of-time compilation of a launch for an architecture that need not be present.

A launch is captured from the kernel's own launcher, called with tensors without data. So the audit compiles what a
real launch compiles: the same constexprs, the same specialisation of pointers, strides and sizes.
Imports Triton; the process must not interpret (`TRITON_INTERPRET`).
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from smoa_kernels.definition.precision import precision_of
from smoa_kernels.kernels.architectures import Architecture
from smoa_kernels.kernels.spec import Config, Kernel

from .forms import representative
from .listing import LINES, Listing, parse_amdgcn, parse_sass
from .workloads import WORKLOADS, Operands, configured

__all__ = ["Binary", "Launch", "capture", "compile_launch", "representative_launch"]


@dataclass(frozen=True)
class Launch:
    """Arguments of one kernel launch, without a device.

    Attributes:
        arguments: parameter name to a pointer type ("*bf16") or to a representative number.
        constexprs: parameter name to its compile-time value.
        options: `num_warps`, `num_stages` and the like.
    """

    arguments: Mapping[str, str | int | float | None]
    constexprs: Mapping[str, Any]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Binary:
    """A compiled kernel: its resources and its machine code.

    Attributes:
        registers: per thread; on AMD vector and accumulation registers together.
        spilled: bytes of registers spilled to memory, per thread.
        stack: bytes of stack per thread, spills included.
        shared: bytes of shared memory per block.
        warps: per block.
        listing: the machine code.
    """

    registers: int
    spilled: int
    stack: int
    shared: int
    warps: int
    listing: Listing


def capture(kernel: Any, launcher: Callable[[], object]) -> Launch:
    """The launch of `kernel` that `launcher()` makes; LookupError if there is none. No kernel runs."""
    launches: list[Launch] = []

    def record(launched: Any, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
        if launched is not kernel:
            return
        bound = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        names = {p.name: p.is_constexpr for p in kernel.params}
        launches.append(
            Launch(
                {n: _argument(v) for n, v in bound.items() if n in names and not names[n]},
                {n: v for n, v in bound.items() if names.get(n)},
                {n: v for n, v in bound.items() if n not in names},
            )
        )

    run = JITFunction.run
    try:
        JITFunction.run = record
        launcher()
    finally:
        JITFunction.run = run
    if not launches:
        raise LookupError(f"{kernel.__name__} was not launched")
    return launches[0]


def representative_launch(
    kernel: Kernel, config: Config, dtype: str, form: str, arch: Architecture
) -> Launch:
    """A launch of one of the kernel's forms, ready to compile."""

    def launcher() -> object:
        operands = Operands(representative(kernel.name, dtype, form), form, torch.device("cpu"), filled=False)
        run, _ = WORKLOADS[kernel.name](operands)
        with configured(kernel.name, config, dtype):
            return run()

    launch = capture(kernel.fn, launcher)
    if not arch.is_amd:
        return launch
    # AMD multiplies float32 in IEEE; the captured launch may have chosen TF32.
    constexprs = {name: "ieee" if value == "tf32" else value for name, value in launch.constexprs.items()}
    return replace(launch, constexprs=constexprs)


def _argument(value: Any) -> str | int | float | None:
    if isinstance(value, torch.Tensor):
        dtype = value.dtype
        if dtype.is_floating_point:
            return f"*{precision_of(dtype, ieee=True).triton}"
        return f"*{'i' if dtype.is_signed else 'u'}{8 * dtype.itemsize}"
    return value  # type: ignore[no-any-return]


def compile_launch(kernel: Any, launch: Launch, arch: Architecture) -> Binary:
    """Compile a launch, captured or written by hand."""
    signature, constants, attributes = _specialise(kernel, launch, arch)
    target = GPUTarget("hip" if arch.is_amd else "cuda", _target_arch(arch), arch.warp_size)
    source = ASTSource(kernel, signature, constants, attributes)
    with _exact_lines(kernel):
        compiled = triton.compile(source, target=target, options=dict(launch.options))
    warps = int(compiled.metadata.num_warps)
    shared = int(compiled.metadata.shared)
    if arch.is_amd:
        return _read_amd(compiled.asm["amdgcn"], shared, warps)
    # Warp-specialised kernels run more warps than num_warps; the true number is in the PTX.
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", compiled.asm["ptx"])
    warps = int(threads[1]) // 32 if threads else warps
    return _read_nvidia(compiled.asm["cubin"], shared, warps)


@contextmanager
def _exact_lines(kernel: Any) -> Iterator[None]:
    """Keep source lines correct through PTX and through Triton's cache.

    Triton's cache identifies a kernel by its text, but its lines name a file. After a compile in another checkout that
    is the other checkout's file, which may be gone.
    """
    file = kernel.fn.__code__.co_filename

    def hook(
        backend: Any = None,
        stages: Any = None,
        options: Any = None,
        language: Any = None,
        capability: Any = None,
    ) -> tuple[str, str]:
        if stages is not None and "ptx" in stages:
            make_ptx = stages["ptx"]
            stages["ptx"] = lambda source, metadata: exact_lines(make_ptx(source, metadata))
        return "lines of files", "lines of files"

    knobs = triton.knobs
    previous = knobs.runtime.add_stages_inspection_hook
    knobs.runtime.add_stages_inspection_hook = hook
    try:
        with knobs.cache.scope():
            # A separate folder: Triton 3.6 does not include the hook's result in the cache key.
            name = hashlib.sha256(f"lines of files of {file}".encode()).hexdigest()[:16]
            knobs.cache.dir = str(Path(knobs.cache.dir) / name)
            yield
    finally:
        knobs.runtime.add_stages_inspection_hook = previous


_LOCATION = re.compile(r"((?:\.loc|inlined_at)\s+(\d+)\s+)([1-9]\d*)")


def exact_lines(ptx: str) -> str:
    """Keep only the first `.loc` of each inline assembly block, and give each file its own range of line numbers.

    Triton emits an unmasked load as several lines of inline assembly, and LLVM increments the line number on each of
    them, so the load would get the number of a later statement. Also, ptxas keeps the previous file if a `.loc` names
    another file but the same line (Triton 3.6, 3.9). `parse_sass` subtracts the multiples of LINES.
    """
    kept: list[str] = []
    locations: int | None = None  # number seen in the current block; None outside
    for line in ptx.splitlines():
        code = line.strip()
        if code.startswith("// begin inline asm"):
            locations = 0
        elif code.startswith("// end inline asm"):
            locations = None
        elif locations is not None and code.startswith(".loc"):
            locations += 1
            if locations > 1:
                continue
        kept.append(_LOCATION.sub(lambda at: f"{at[1]}{int(at[2]) * LINES + int(at[3])}", line))
    return "\n".join(kept) + "\n"


def _target_arch(arch: Architecture) -> str | int:
    return arch.name if arch.is_amd else int(arch.name.removeprefix("sm_"))


_Path = tuple[int, ...]


def _specialise(
    kernel: Any, launch: Launch, arch: Architecture
) -> tuple[dict[str, str], dict[_Path, Any], dict[_Path, list[list[Any]]]]:
    """Specialise the arguments as Triton's launch does: 1 and None become constants, 16 | n an attribute."""
    signature: dict[str, str] = {}
    constants: dict[_Path, Any] = {}
    attributes: dict[_Path, list[list[Any]]] = {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            value = launch.constexprs.get(name, parameter.default if parameter.has_default else None)
            signature[name], constants[(i,)] = "constexpr", value
            continue
        value = launch.arguments[name]
        specialise = not parameter.do_not_specialize
        aligned = specialise and not parameter.do_not_specialize_on_alignment
        if value is None or (specialise and isinstance(value, int) and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, str):
            signature[name] = value
            if aligned and value.startswith("*"):
                attributes[(i,)] = [["tt.divisibility", 16]]
                if arch.is_amd:  # every tensor of a representative launch is below 2 GiB
                    attributes[(i,)].append(["tt.pointer_range", 32])
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if aligned and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return signature, constants, attributes


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _read_nvidia(cubin: bytes, shared: int, warps: int) -> Binary:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _output(_tool("cuobjdump"), "--dump-resource-usage", str(path))
        listing = parse_sass(_output(_tool("nvdisasm"), "-g", "-c", str(path)))
    registers, stack = (int(re.findall(rf"{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK"))
    return Binary(registers, listing.local_bytes(), stack, shared, warps, listing)


def _read_amd(text: str, shared: int, warps: int) -> Binary:
    count = {
        key: int(re.findall(rf"\.{key}:\s+(\d+)", text)[-1])
        for key in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    }
    # vgpr_count covers the unified register file, accumulation registers included.
    spilled = 4 * count["vgpr_spill_count"]  # scalar registers spill into vector lanes, not to memory
    stack = count["private_segment_fixed_size"]
    return Binary(count["vgpr_count"], spilled, stack, shared, warps, parse_amdgcn(text))


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
