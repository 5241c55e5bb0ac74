"""A Triton driver without a GPU: `kernel[grid](...)` on CPU tensors compiles for a GPU and runs in the emulator.

Everything up to the launch is Triton's own: the specialisation of the arguments and the compiler down to PTX. ptxas
does not run; the PTX takes the place of the cubin and is passed to the launch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from benchmarks.fake_gpu import FakeDriver, FakeGpu
from smoa_kernels.kernels.architectures import limits


@dataclass(frozen=True)
class Argument:
    """A kernel argument: the parameter's name, its Triton type ("*bf16", "i32") and its value."""

    name: str
    kind: str
    value: Any


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel, with all that a launch needs."""

    name: str
    ptx: str
    num_warps: int
    shared: int
    arch: int


Launch: TypeAlias = Callable[[Kernel, tuple[int, int, int], list[Argument]], None]


class PtxCompiler(CUDABackend):  # type: ignore[misc]
    """Triton's compiler, stopped after PTX."""

    def make_cubin(self, src: str, *_: Any) -> bytes:
        return src.encode()

    def hash(self) -> str:
        return f"{super().hash()}-ptx"  # part of the cache key, so that real cubins keep their own


def _launcher(launch: Launch) -> type:
    class Launcher:
        """The launcher that a compiled kernel calls."""

        def __init__(self, src: Any, metadata: Any) -> None:
            if metadata.global_scratch_size or metadata.profile_scratch_size:
                raise NotImplementedError("the emulator has no scratch memory, which this kernel asks for")
            if getattr(metadata, "num_ctas", 1) != 1:
                raise NotImplementedError("the emulator has no clusters, which this kernel asks for")
            self.metadata = metadata
            self.name = src.fn.__name__
            self.signature: Mapping[str, str] = src.signature

        def __call__(self, x: int, y: int, z: int, stream: int, ptx: str, *rest: Any) -> None:
            _packed, _launch_metadata, _enter_hook, _leave_hook, *values = rest
            arguments = [
                Argument(name, kind, value)
                for (name, kind), value in zip(self.signature.items(), values, strict=True)
                if kind != "constexpr"
            ]
            m = self.metadata
            kernel = Kernel(self.name, ptx, m.num_warps, m.shared, m.target.arch)
            launch(kernel, (x, y, z), arguments)

    return Launcher


class EmulatorDriver(FakeDriver):
    """A driver with one device of one architecture, whose memory is the CPU's."""

    def __init__(self, arch: int, launch: Launch) -> None:
        super().__init__(FakeGpu(devices=1))
        self.arch = arch
        shared = limits(f"sm_{arch}").shared_per_block
        self.launcher_cls = _launcher(launch)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": shared},
            # module, function, registers, spills, maximum threads per block
            load_binary=lambda name, ptx, shared, device: (object(), ptx.decode(), 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def install(arch: int, launch: Launch) -> None:
    """Make Triton compile for `arch` and launch with `launch` for the rest of this process."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET must not be set: the emulator runs compiled kernels")
    backends["nvidia"] = replace(backends["nvidia"], compiler=PtxCompiler)
    triton.runtime.driver.set_active(EmulatorDriver(arch, launch))
