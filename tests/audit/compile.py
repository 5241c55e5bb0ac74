"""Ahead-of-time compilation of a launch for an architecture that need not be present.

A launch is captured from the kernel's own launcher, called with tensors without data. So the audit compiles the form of
a real launch: the same constexprs, the same specialisation of pointers, strides and sizes.
Imports Triton; the process must not interpret (`TRITON_INTERPRET`).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

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


def representative_launch(
    kernel: Kernel, config: Config, dtype: str, form: str, arch: Architecture
) -> Launch:
    """A launch of one of the kernel's forms, ready to compile. No kernel runs."""
    launches: list[dict[str, Any]] = []

    def record(launched: Any, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
        if launched is kernel.fn:
            launches.append(dict(zip(launched.arg_names, args, strict=False)) | kwargs)

    operands = Operands(representative(kernel.name, dtype, form), form, torch.device("cpu"), filled=False)
    with patch.object(JITFunction, "run", record), configured(kernel.name, config, dtype):
        WORKLOADS[kernel.name](operands)[0]()  # preparing launches, too
    bound, names = launches[0], {p.name: p.is_constexpr for p in kernel.fn.params}
    # AMD multiplies float32 in IEEE; the launch may have chosen TF32.
    constexprs = {n: "ieee" if arch.is_amd and v == "tf32" else v for n, v in bound.items() if names.get(n)}
    return Launch(
        {n: _argument(v) for n, v in bound.items() if n in names and not names[n]},
        constexprs,
        {n: v for n, v in bound.items() if n not in names},
    )


def _argument(value: Any) -> str | int | float | None:
    if isinstance(value, torch.Tensor):
        dtype = value.dtype
        if dtype.is_floating_point:
            return f"*{precision_of(dtype, ieee=True).name}"
        return f"*{'i' if dtype.is_signed else 'u'}{8 * dtype.itemsize}"
    return value  # type: ignore[no-any-return]


def compile_launch(kernel: Any, launch: Launch, arch: Architecture) -> tuple[dict[str, int], Listing]:
    """Compile a launch, captured or written by hand: its resources, as `Record` names them, and its machine code."""
    signature, constants, attributes = _specialise(kernel, launch, arch)
    name = arch.name if arch.is_amd else int(arch.name.removeprefix("sm_"))
    target = GPUTarget("hip" if arch.is_amd else "cuda", name, arch.warp_size)
    source = ASTSource(kernel, signature, constants, attributes)
    with _exact_lines():
        compiled = triton.compile(source, target=target, options=dict(launch.options))
    asm, shared = compiled.asm, int(compiled.metadata.shared)
    figures, listing = _read_amd(asm["amdgcn"]) if arch.is_amd else _read_nvidia(asm["cubin"])
    return {"shared": shared, **figures}, listing


@contextmanager
def _exact_lines() -> Iterator[None]:
    """Keep source lines correct through PTX, and do not use Triton's cache.

    The cache identifies a kernel by its text, but the kernel's lines name a file. If another checkout compiled the
    kernel, they name that checkout's file, which may be gone.
    """

    def hook(backend: Any = None, stages: Any = (), *others: Any) -> tuple[str, str]:
        if "ptx" in stages:
            make_ptx = stages["ptx"]
            stages["ptx"] = lambda source, metadata: exact_lines(make_ptx(source, metadata))
        return "lines of files", "lines of files"

    knobs = triton.knobs
    watched = patch.object(knobs.runtime, "add_stages_inspection_hook", hook)
    with watched, knobs.cache.scope(), tempfile.TemporaryDirectory() as folder:
        knobs.cache.dir = folder
        yield


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


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _read_nvidia(cubin: bytes) -> tuple[dict[str, int], Listing]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "--dump-resource-usage", str(path))
        listing = parse_sass(_tool("nvdisasm", "-g", "-c", str(path)))
    registers, stack = (int(re.findall(rf"{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK"))
    return {"registers": registers, "spilled": listing.local_bytes(), "stack": stack}, listing


def _read_amd(text: str) -> tuple[dict[str, int], Listing]:
    count = {
        key: int(re.findall(rf"\.{key}:\s+(\d+)", text)[-1])
        for key in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    }
    figures = {
        "registers": count["vgpr_count"],  # of the unified file, accumulation registers included
        "spilled": 4 * count["vgpr_spill_count"],  # scalar registers spill into vector lanes, not to memory
        "stack": count["private_segment_fixed_size"],
    }
    return figures, parse_amdgcn(text)
