"""Calls a library compiled for ARM in qemu (arm.c); this process keeps the tensors."""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import struct
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from smoa_kernels.backends.native.library import Call, Layer

CC, PROGRAMS = "aarch64-linux-gnu-gcc", ("qemu-aarch64", "qemu-aarch64-static")
PROCESSOR = "cortex-a53"
"""It has the instructions that every 64-bit ARM has, and no others."""
_BYTES = {0: 4, 1: 2, 2: 2}


def qemu() -> str | None:
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


def unsupported_reason() -> str | None:
    missing = [name for name, path in ((CC, shutil.which(CC)), (PROGRAMS[0], qemu())) if path is None]
    packages = "apt-get install qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
    return f"needs {' and '.join(missing)}, which are not installed: {packages}" if missing else None


def compile_program(into: Path) -> None:
    """Compiles arm.c."""
    subprocess.run([CC, "-O1", Path(__file__).with_name("arm.c"), "-o", into / "arm"], check=True)


def load(name: str, **options: Any) -> Any:
    """In place of `ctypes.CDLL`; the OpenMP runtime is opened by the next emulator."""
    if name.endswith("linear_neon.so"):
        return Emulator(name)
    Emulator.mode = options["mode"]
    return None


class Emulator:
    """A library in qemu: a function's struct and all memory that it points to are copied there and back."""

    mode = 0
    """In which the OpenMP runtime is opened."""

    def __init__(self, library: str) -> None:
        asked = [CC, "-print-file-name=libc.so.6"]
        libc = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
        emulated = [str(qemu()), "-cpu", PROCESSOR, "-L", libc.resolve().parent.parent]
        command = [*emulated, Path(library).with_name("arm"), library, str(self.mode)]
        # Emulated threads that wait by spinning would take the time of those that compute.
        environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, env=environment, **pipes)
        atexit.register(self._process.communicate)  # it ends when no more is to be read
        self._lock, self._floats = threading.Lock(), dict[int, int]()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("smoa_"):
            raise AttributeError(name)
        function = partial(self._call, name)
        setattr(self, name, function)
        return function

    def _call(self, name: str, reference: Any) -> int:
        given = reference._obj
        regions = list(_regions(name, given, self._floats)) if isinstance(given, Call) else []
        size = ctypes.sizeof(given)
        request = struct.pack("24sqq", name.encode(), size, len(regions)) + bytes(given)
        request += b"".join(struct.pack("qqqq", *region[1:]) for region in regions)
        sent = [ctypes.string_at(address, count) for address, _, count, copied, _ in regions if copied]
        with self._lock:
            to, answers = self._process.stdin, self._process.stdout
            assert to is not None
            assert answers is not None
            to.write(request + b"".join(sent))
            to.flush()
            head = answers.read(8 + size)
            assert len(head) == 8 + size, f"{name} stopped in qemu: code {self._process.wait()}"
            for address, _, count, _, returned in regions:
                if returned:
                    ctypes.memmove(address, answers.read(count), count)
            source = answers.read(16) if name == "smoa_about" else b""
        (result,) = struct.unpack("q", head[:8])
        if isinstance(given, Call):
            self._floats[id(given)] = result
        else:
            ctypes.memmove(ctypes.addressof(given), head[8:], size)
            given.source = source
        return int(result)


def _reach(width: int, *steps: tuple[int, int]) -> int:
    """Bytes from the first to the last element: pairs of a count and a stride."""
    return width * (1 + sum((n - 1) * by for n, by in steps)) if all(n for n, _ in steps) else 0


def _regions(name: str, call: Call, floats: dict[int, int]) -> Iterator[tuple[int, int, int, bool, bool]]:
    """Each region: address, the address's place in the struct, bytes, whether it is sent, whether it is returned."""
    layer, experts = call.layer, max(call.experts, 1)
    rows, cols, rank, blocks = layer.rows, layer.cols, layer.rank, layer.blocks
    x, factor = _BYTES[call.dtype], _BYTES[layer.factor_dtype]
    out = cols if name == "smoa_input" else rows
    mask = 2 * (call.tokens * -(-cols // 16) + 1)
    sizes = {
        "weight": _reach(
            _BYTES[layer.dtype],
            (experts, call.weight_step),
            (rows, layer.row_stride),
            (cols, layer.col_stride),
        ),
        "A": _reach(factor, (experts, call.A_step), (rank, layer.A_rank), (cols, layer.A_col)),
        "B": _reach(factor, (experts, call.B_step), (rows, layer.B_row), (rank, layer.B_rank)),
        "ranks": 4 * blocks,
        "row_index": 8 * rows,
        "col_index": 8 * cols,
        "row_offsets": 4 * (blocks + 1 + (experts - 1) * call.row_offsets_step),
        "col_offsets": 4 * (blocks + 1 + (experts - 1) * call.col_offsets_step),
    }
    for field, size in sizes.items():
        if address := getattr(layer, field):
            yield address, getattr(Layer, field).offset, size, True, False
    check = 4 * (64 + max(rows, cols))  # what Call.of takes
    sizes = {
        "x": _reach(x, (call.tokens, call.x_stride), (cols, 1)),
        "dy": _reach(x, (call.tokens, call.dy_stride), (rows, 1)),
        "keep": mask,
        "bias": x * rows,
        "y": mask - 2 if name == "smoa_mask" else _reach(x, (call.tokens, call.y_stride), (out, 1)),
        "dA": factor * experts * rank * cols,
        "dB": factor * experts * rank * rows,
        "workspace": check if name == "smoa_check" else 4 * floats.get(id(call), 0),
        "ends": 4 * call.experts,
        "row_index": call.row_bytes * ((experts - 1) * call.row_step + rows),
        "col_index": call.col_bytes * ((experts - 1) * call.col_step + cols),
    }
    written = dict.fromkeys(("smoa_forward", "smoa_input", "smoa_mask"), ("y",))
    written["smoa_gradient"] = "dA", "dB"
    read = {
        "smoa_forward": ("x", "keep", "bias"),
        "smoa_input": ("dy", "keep"),
        "smoa_gradient": ("x", "dy", "keep"),
    }
    used = (*written.get(name, ()), *read.get(name, ()), "workspace", "ends", "row_index", "col_index")
    if name in read and not call.workspace:  # it only asks for the size of one
        used = ("ends",)
    for field in used:
        if address := getattr(call, field):
            returned = field in written.get(name, ())
            yield address, getattr(Call, field).offset, sizes[field], field != "workspace", returned
