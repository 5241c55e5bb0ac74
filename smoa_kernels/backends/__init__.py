"""Which backend runs where: "eager" anywhere, "native" on x86 and ARM CPUs, "triton" on GPUs, "reference" for tests.

A backend is a module that obeys :class:`Backend`. In every backend the function that computes dA and dB is called
`factor_gradients`, and the function that computes dX `input_gradient`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from ..checks import first_line
from ..definition.dropout import Dropout
from ..definition.experts import ExpertsAdapter
from ..definition.packed import PackedAdapter
from ..definition.precision import KERNEL_DTYPES, dtype_names, gemm_is_ieee, precision_of
from ..kernels.architectures import ON_AMD, architecture_of, gpu_properties
from .native.library import unsupported_reason as library_unsupported_reason

BACKEND_CHOICES = ("auto", "eager", "native", "triton", "reference")
ALGORITHM_CHOICES = ("auto", "merged", "split", "expanded", "fused")

F = TypeVar("F", bound=Callable[..., Any])

_OLDEST_TRITON = "3.6"
_OLDEST_CAPABILITY = (8, 0)
# Wrong machine code: major compute capabilities, the precision (empty: any), the first Triton that is right, and why.
_MISCOMPILED = (
    # A tensor-core instruction of Hopper (wgmma) may read its left operand from registers. In TF32 new values are
    # written into them before it has read the old ones (triton#9433, triton#11781). The audit found this with Triton
    # 3.6, 3.7.1 and 3.8.0, in the product of dX, and not with 3.9.
    ((9,), "tf32", "3.9", "compiles TF32 for Hopper wrongly (not IEEE float32)"),
    # Tensor cores may read shared memory before a store or a copy to it has arrived: wrong and changing results on a
    # B200 with 3.7.0 (pytorch#181248). Capability 11 has the same instructions. Hopper's code lacks the same fence, but
    # no wrong result is known there.
    ((10, 11), "", "3.7.1", "leaves out a fence on Blackwell, so results may be wrong (triton#9610)"),
)
MOST_TRITON_RANKS = 256
"""ρ up to which the kernels take an adapter."""

_warned: list[str] = []  # the one warning of this process

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""(dX, dA, dB), None where not needed."""


class Backend(Protocol):
    """The interface of a backend; the adapter holds W0, factors, blocks, ranks and s."""

    @property
    def ALGORITHMS(self) -> tuple[str, ...]:
        """The algorithms that a caller may name, beside "auto"."""

    def forward(
        self, x: Tensor, bias: Tensor | None, adapter: PackedAdapter, algorithm: str, dropout: Dropout | None
    ) -> Tensor:
        """`y = x W0ᵀ + b + dropout(x) ΔWᵀ`: x (T, C) -> y (T, N) in x's dtype, which is W0's."""

    def backward(
        self, dy: Tensor, x: Tensor | None, adapter: PackedAdapter, dropout: Dropout | None, *, needs_x: bool
    ) -> Gradients:
        """Gradients of `forward` for dy (T, N): dX where `needs_x`, dA and dB where x (T, C) is given."""

    def modulated_weight(self, adapter: PackedAdapter) -> Tensor:
        """`W_eff`, (N, C) in W0's dtype."""


class ExpertsBackend(Protocol):
    """The interface of a backend for experts; x has the dtype of the adapter's W0."""

    def experts_forward(self, x: Tensor, ends: Tensor, adapter: ExpertsAdapter) -> Tensor:
        """`y_p = x_p W0_eᵀ + x_p ΔW_eᵀ`, e the expert of pair p: x (P, C) -> y (P, N) in x's dtype.

        x is sorted by expert. `ends`, int32 (E,), counts the pairs of all experts up to each expert, like `offs` of
        `grouped_mm`. In half precision the adapter's output is added before the base GEMM rounds, once.
        """

    def experts_backward(
        self, dy: Tensor, x: Tensor | None, ends: Tensor, adapter: ExpertsAdapter, *, needs_x: bool
    ) -> Gradients:
        """Gradients of `experts_forward` for dy (P, N): dX where `needs_x`, dA and dB where x is given.

        Those of an expert without pairs are exactly zero.
        """


# The module of each backend, and that of its experts.
_MODULES = {
    "eager": (".eager", ".experts"),
    "native": (".native.backend", ".native.experts"),
    "triton": (".verified", ".verified"),
    "reference": (".reference", ".experts"),
}


def _constant(function: F) -> F:
    """Make a function's result a constant in compiled graphs, because compilers cannot trace imports.

    Sets the mark of `torch.compiler.assume_constant_result`, which itself would import the compiler and Triton.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
def load_backend(name: str) -> Backend:
    """Import the module of a resolved backend; the kernels, and with them Triton, are imported only when asked for."""
    return cast(Backend, importlib.import_module(_MODULES[name][0], __package__))


@functools.cache
def load_experts_backend(name: str) -> ExpertsBackend:
    """Import the module that computes a resolved backend's experts."""
    return cast(ExpertsBackend, importlib.import_module(_MODULES[name][1], __package__))


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype, rank: int) -> str:
    """Name the backend that `backend` means for a problem: "auto" is the fastest that can run it.

    Args:
        backend: one of `BACKEND_CHOICES`.
        device: of the activations.
        dtype: that the GEMM multiplies.
        rank: ρ, rows of A.

    Raises:
        ValueError: the backend asked for cannot run here; the message says why and what to do.
    """
    if backend in ("eager", "reference"):
        return backend
    name = backend if backend != "auto" else "triton" if device.type == "cuda" else "native"
    reason = (
        triton_unsupported_reason(device, dtype, rank)
        if name == "triton"
        else native_unsupported_reason(device, dtype)
    )
    if reason is None:
        return name
    if backend == "auto":
        if name == "triton" and dtype in KERNEL_DTYPES and rank <= MOST_TRITON_RANKS:
            _warn_once(device, reason)
        return "eager"
    raise ValueError(f"backend={name!r} cannot run here: {reason}; backend='eager' works everywhere")


@_constant
def native_unsupported_reason(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Say why the compiled CPU code cannot take a problem of :func:`resolve_backend`; None where it can."""
    if dtype not in KERNEL_DTYPES:
        return f"the compiled code takes {dtype_names(KERNEL_DTYPES)}, got {dtype}"
    if device.type != "cpu":
        return f"x is on {device.type}, the compiled code runs on CPUs"
    if dtype == torch.float32 and not gemm_is_ieee(dtype, "cpu"):
        return "torch's float32 GEMMs on CPUs are set to multiply in less than float32"
    return library_unsupported_reason()


def triton_unsupported_reason(
    device: torch.device, dtype: torch.dtype = torch.float32, rank: int = 1
) -> str | None:
    """Say why the kernels cannot take a problem of :func:`resolve_backend`; None where they can."""
    if dtype not in KERNEL_DTYPES:
        return f"the kernels take {dtype_names(KERNEL_DTYPES)}, got {dtype}"
    if rank > MOST_TRITON_RANKS:
        return f"the kernels take ranks up to {MOST_TRITON_RANKS}, got {rank}"
    return _kernel_unsupported_reason(device) or _compiler_unsupported_reason(device, dtype)


def miscompiled(capability: int, precision: str, version: str) -> str | None:
    """Say what a `version` of Triton compiles wrongly for NVIDIA's GPUs of a major `capability`; None if it is unknown.

    `precision` is that of the products, one of `precision.KERNEL_PRECISIONS`.
    """
    for capabilities, of_precision, right, why in _MISCOMPILED:
        if capability in capabilities and of_precision in ("", precision) and TorchVersion(version) < right:
            return f"triton {version} {why}: update it to {right} or newer"
    return None


@_constant
def algorithms_of(backend: str) -> tuple[str, ...]:
    """Name the algorithms that a resolved backend has beside "auto"."""
    return load_backend(backend).ALGORITHMS


@_constant
def _warn_once(device: torch.device, reason: str) -> None:
    """Warn that "auto" leaves a GPU of this machine to torch's operators; once in a process."""
    if not _warned and (device.index or 0) < torch.cuda.device_count():
        _warned.append(reason)
        warnings.warn(
            f"torch's operators, which are slower, replace the kernels on {device}: {reason}", stacklevel=2
        )


@_constant
def _compiler_unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    return miscompiled_on(device, precision_of(dtype, ieee=gemm_is_ieee(dtype, "cuda")).name)


@functools.cache
def miscompiled_on(device: torch.device, precision: str) -> str | None:
    """Say what the Triton that is installed compiles wrongly for a device; None if nothing is known."""
    if device.type == "cpu" or torch.version.hip is not None:
        return None
    triton = importlib.import_module("triton")
    return miscompiled(gpu_properties(device).major, precision, triton.__version__)


@_constant
def _kernel_unsupported_reason(device: torch.device) -> str | None:
    return _device_unsupported_reason(device)


@functools.cache
def _device_unsupported_reason(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return f"triton is not installed: install {_OLDEST_TRITON} or newer"
    triton = importlib.import_module("triton")
    if TorchVersion(triton.__version__) < _OLDEST_TRITON:
        return f"triton {triton.__version__} is older than {_OLDEST_TRITON}, the oldest supported: update it"
    if device.type == "cpu":
        if triton.knobs.runtime.interpret:
            return None
        return "x is on the CPU, where kernels run only under Triton's interpreter (TRITON_INTERPRET=1)"
    if device.type != "cuda":
        return f"x is on {device.type}, the kernels are compiled for CUDA and ROCm only"
    try:
        properties = gpu_properties(device)
    except ValueError as error:
        reason = first_line(error.__cause__ or error)
        return f"x is on {device}, which this machine does not have: {reason}"
    if torch.version.hip is not None:
        name = architecture_of(properties)
        return (
            None if name in ON_AMD else f"the GPU is {name}, of AMD's the kernels run on {', '.join(ON_AMD)}"
        )
    capability = properties.major, properties.minor
    if capability < _OLDEST_CAPABILITY:
        return f"the GPU's compute capability is {capability[0]}.{capability[1]}, the oldest supported is 8.0"
    return None
