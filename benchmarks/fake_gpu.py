"""A pretended GPU for Triton: it records launches and runs nothing.

Everything up to the launch is Triton's own code: binding and specialising the arguments, the key of the compiled form,
the lookup. Nothing is compiled: a `FakeKernel` replaces the compiled kernel, so the driver's share of a launch is
missing. The process must not interpret (`TRITON_INTERPRET`).

    >>> gpu = install()
    >>> kernel[(4,)](x, y, BLOCK=64)
    >>> gpu.launches
    [Launch(kernel='kernel', form=..., device=0, stream=100, ...)]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from smoa_kernels import BlockPartition
from smoa_kernels.definition.packed import PackedAdapter

RANK, BLOCKS = 16, 4  # of `adapter`

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30
)


Form: TypeAlias = tuple[JITFunction, tuple[Any, ...]]
"""A kernel, and its signature, constants, attributes and options."""


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: the function's name.
        form: the key under which Triton keeps the compiled kernel.
        constants: the part of the form that the launcher chose: the kernel's own compile-time arguments, warps and
            stages. Triton derives the rest from the numbers and addresses that it is given.
        device: the current one at the launch.
        stream: that device's current stream.
        numbers: the grid, and the arguments that are not pointers.
    """

    kernel: str
    form: str
    constants: str
    device: int
    stream: int
    numbers: tuple[object, ...]


@dataclass
class FakeGpu:
    """The state of the pretended driver.

    Attributes:
        devices: their number.
        properties: of each, as torch gives them.
        current: the number of the current one.
        compiled: the forms that Triton would have compiled, in order.
        launches: the launches while `recording` was on.
        recording: a benchmark turns it off, so that it does not time the list.
    """

    devices: int
    properties: SimpleNamespace = field(default_factory=lambda: H100)
    current: int = 0
    compiled: list[Form] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    recording: bool = True

    def exchange(self, device: int) -> int:
        """Make a device the current one; returns the one before. A negative number changes nothing."""
        before = self.current
        if device >= 0:
            self.current = device
        return before


def pretend_cpu(arch: str, multiprocessors: int) -> None:
    """Make smoa_kernels treat the CPU's tensors as those of a GPU of this architecture, for the life of the process.

    Raises:
        RuntimeError: the kernels were imported before this call.
    """
    if "smoa_kernels.kernels.spec" in sys.modules:
        raise RuntimeError("the kernels must be imported after this")
    from smoa_kernels import backends
    from smoa_kernels.kernels import architectures

    answers = {"architecture": arch, "multiprocessors": multiprocessors}
    for name, answer in answers.items():
        setattr(architectures, name, lambda device, answer=answer: answer)
    setattr(backends, "_device_unsupported_reason", lambda device: None)  # noqa: B010  # mypy knows it as a function


class FakeKernel(CompiledKernel):  # type: ignore[misc]  # of which mypy knows nothing
    """The interface of a compiled kernel that Triton uses for a launch."""

    function = packed_metadata = module = src = None

    def __init__(self, gpu: FakeGpu, name: str, form: str, constants: str) -> None:
        # Triton's own constructor is not called: it reads the compiler's results.
        self.gpu, self.name, self.form, self.constants = gpu, name, form, constants

    def _init_handles(self) -> None:
        """Load nothing."""

    @property
    def run(self) -> Callable[..., None]:
        """The function that launches."""
        return self._record

    def _record(self, *given: Any) -> None:
        """Note a launch: Triton gives the grid, the stream, five things of its own, and the kernel's arguments."""
        if self.gpu.recording:
            numbers = *given[:3], *(one for one in given[9:] if not isinstance(one, torch.Tensor))
            launch = Launch(self.name, self.form, self.constants, self.gpu.current, given[3], numbers)
            self.gpu.launches.append(launch)


class FakeDriver(DriverBase):  # type: ignore[misc]  # of which mypy knows nothing
    """Triton's driver of the pretended GPUs."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu

    @classmethod
    def is_active(cls) -> bool:
        """Say that there is a GPU."""
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Refuse: no launcher is generated in C."""
        raise NotImplementedError("a pretended GPU has no launcher in C")

    def get_current_target(self) -> GPUTarget:
        """The target that kernels would be compiled for."""
        from smoa_kernels.kernels.architectures import architecture_of, limits

        name = architecture_of(self.gpu.properties)
        if limits(name).is_amd:
            return GPUTarget("hip", name, limits(name).warp_size)
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        """The number of the current device."""
        return self.gpu.current

    def get_current_stream(self, device: int) -> int:
        """The current stream of a device."""
        return 100 + device  # another for each

    def get_active_torch_device(self) -> torch.device:
        """The current device."""
        return torch.device("cuda", self.gpu.current)

    def get_benchmarker(self) -> Any:
        """Refuse: nothing can be timed."""
        raise NotImplementedError("a pretended GPU times nothing")


def install(devices: int = 1, properties: SimpleNamespace = H100) -> FakeGpu:
    """Make the pretended driver Triton's active one, and tell torch of as many GPUs, for the life of the process.

    Only those functions of torch are replaced that this package calls: the current device, its properties, whether its
    stream is captured, and changing the current device. Nothing can be computed on it.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET must not be set: launches are Triton's interpreter's then")
    gpu = FakeGpu(devices, properties)

    def compile_nothing(
        self: Any,
        key: str,
        signature: object,
        device: int,
        constexprs: Any,
        options: Any,
        attributes: object,
        warmup: bool,
    ) -> FakeKernel:
        chosen = {path: value for path, value in constexprs.items() if self.params[path[0]].is_constexpr}
        constants = f"{chosen} {options.num_warps} {options.num_stages}"
        gpu.compiled.append((self, (signature, constexprs, attributes, options)))
        kernel = FakeKernel(gpu, self.fn.__name__, key, constants)
        self.device_caches[device][0][key] = kernel
        return kernel

    def properties_of(device: torch.device | int) -> SimpleNamespace:
        if isinstance(device, torch.device) and device.type != "cuda":  # as torch does
            raise ValueError(f"Expected a cuda device, but got: {device}")
        return gpu.properties

    JITFunction._do_compile = compile_nothing
    triton.runtime.driver.set_active(FakeDriver(gpu))
    for name, answer in {
        "is_available": lambda: True,
        "device_count": lambda: gpu.devices,
        "current_device": lambda: gpu.current,
        "get_device_properties": properties_of,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda: None,
        "_exchange_device": gpu.exchange,
        "_maybe_exchange_device": gpu.exchange,
    }.items():
        setattr(torch.cuda, name, answer)
    return gpu


def adapter(
    out_features: int,
    in_features: int,
    device: str,
    factors: torch.dtype,
    granule: int = 1,
    weight: torch.dtype = torch.bfloat16,
    blocks: int = BLOCKS,
) -> PackedAdapter:
    """A layer's operands without data, in torch's `FakeTensorMode`: blocks of one size; of granules, contiguous."""
    rho = RANK // blocks

    def empty(*shape: int, dtype: torch.dtype = weight) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    features = out_features, in_features
    offsets = [empty(blocks + 1, dtype=torch.int32) for _ in features]
    labels = [empty(n, dtype=torch.uint8) for n in features]
    indices = [empty(n, dtype=torch.int64) for n in features]
    sizes = [n // blocks + (k < n % blocks) for n in features for k in range(blocks)] + [granule, granule > 1]
    return PackedAdapter(
        empty(*features),
        empty(rho, in_features, dtype=factors),
        empty(out_features, rho, dtype=factors),
        BlockPartition.from_tensors([*labels, *indices, *offsets], sizes),
        empty(blocks, dtype=torch.int32),
        empty(dtype=torch.float32),
    )
