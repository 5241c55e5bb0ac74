"""Which backend runs where: "eager" anywhere, "native" in float32 on x86 CPUs, "triton" on GPUs, "reference" for tests.

A backend is a module with three names (its `PackedAdapter` holds W0, A, B, blocks, ranks and s):

    ALGORITHMS                                             those that it can be told to run
    forward(x, bias, adapter, algorithm, dropout)          x (T, C) -> y (T, N)
    backward(dy, x, adapter, dropout, *, needs_x)          dy (T, N), x (T, C) or None -> dX, dA, dB, each or None
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar, cast

import torch

from ..checks import cached, check_choice, check_kind, first_line
from ..cost.gpus import gpu_properties
from ..definition.precision import KERNEL_DTYPES, dtype_names, gemm_is_ieee
from .native.library import obstacle as library_obstacle

__all__ = [
    "ALGORITHMS",
    "BACKENDS",
    "MOST_TRITON_RANKS",
    "algorithms_of",
    "load_backend",
    "native_obstacle",
    "resolve_backend",
    "triton_obstacle",
]

BACKENDS = ("auto", "eager", "native", "triton", "reference")
ALGORITHMS = ("auto", "merged", "split", "expanded", "fused")

_MODULES = {
    "eager": ".eager",
    "native": ".native.backend",
    "triton": ".triton",
    "reference": "..definition.reference",
}

F = TypeVar("F", bound=Callable[..., Any])

_OLDEST_TRITON = (3, 6)
_OLDEST_CAPABILITY = (8, 0)
MOST_TRITON_RANKS = 256
"""ρ up to which the kernels take an adapter."""


@cached
def load_backend(name: str) -> ModuleType:
    """The module of a resolved backend; the kernels, and with them triton, are imported only when asked for.

    Args:
        name: "eager", "native", "triton" or "reference".

    Raises:
        ValueError: another name.

    Example:
        >>> load_backend("eager").ALGORITHMS
        ('merged', 'split', 'expanded')
    """
    check_choice("name", name, BACKENDS[1:])
    return importlib.import_module(_MODULES[name], __package__)


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype, rank: int) -> str:
    """The backend that "auto" means for a problem; raises where the one asked for cannot take it.

    Args:
        backend: one of `BACKENDS`.
        device: of the activations.
        dtype: that the GEMM multiplies.
        rank: ρ, rows of A.

    Raises:
        TypeError: no device.
        ValueError: unknown, or cannot run here; the message says why and what to do.

    Example:
        >>> resolve_backend("auto", torch.device("cpu"), torch.bfloat16, rank=8)
        'eager'
    """
    check_choice("backend", backend, BACKENDS)
    check_kind("device", device, torch.device)
    if backend in ("eager", "reference"):
        return backend
    name = backend if backend != "auto" else "triton" if device.type == "cuda" else "native"
    obstacle = triton_obstacle(device, dtype, rank) if name == "triton" else native_obstacle(device, dtype)
    if obstacle is None:
        return name
    if backend == "auto":
        return "eager"
    raise ValueError(f"backend={name!r} cannot run here: {obstacle}; backend='eager' works everywhere")


def native_obstacle(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why the compiled CPU code cannot take a problem, or None where it can.

    Args:
        device: of the activations.
        dtype: that the GEMM multiplies.

    Raises:
        TypeError: no device.

    Example:
        >>> native_obstacle(torch.device("cpu"), torch.bfloat16)
        'the compiled code takes float32, got torch.bfloat16'
    """
    check_kind("device", device, torch.device)
    if dtype != torch.float32:
        return f"the compiled code takes float32, got {dtype}"
    if device.type != "cpu":
        return f"x is on {device.type}, the compiled code runs on CPUs"
    return _library_obstacle()


def triton_obstacle(device: torch.device, dtype: torch.dtype = torch.float32, rank: int = 1) -> str | None:
    """Why the kernels cannot take a problem, or None where they can.

    Args:
        device: of the activations.
        dtype: that the GEMM multiplies.
        rank: ρ, rows of A.

    Raises:
        TypeError: no device, no rank.

    Example:
        >>> triton_obstacle(torch.device("cpu"), torch.float64)
        'the kernels take bfloat16, float16, float32, got torch.float64'
    """
    check_kind("device", device, torch.device)
    if not isinstance(rank, (int, torch.SymInt)):
        raise TypeError(f"rank must be an int, got {rank!r}")
    if not isinstance(dtype, torch.dtype) or dtype not in KERNEL_DTYPES:
        return f"the kernels take {dtype_names(KERNEL_DTYPES)}, got {dtype}"
    if rank > MOST_TRITON_RANKS:
        return f"the kernels take ranks up to {MOST_TRITON_RANKS}, got {rank}"
    return _obstacle(device)


def _constant(function: F) -> F:
    """A constant in compiled graphs: compilers cannot look into imports, and need not.

    Marked as `torch.compiler.assume_constant_result` marks it, which would import the compiler, and with it triton.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def algorithms_of(backend: str) -> tuple[str, ...]:
    """What a resolved backend has beside "auto".

    Args:
        backend: "eager", "native", "triton" or "reference".

    Example:
        >>> algorithms_of("eager")
        ('merged', 'split', 'expanded')
    """
    return cast("tuple[str, ...]", load_backend(backend).ALGORITHMS)


@_constant
def _library_obstacle() -> str | None:
    if not gemm_is_ieee(torch.float32, "cpu"):
        return "torch's float32 GEMMs on CPUs are set to multiply in less than float32"
    return library_obstacle()


@_constant
def _obstacle(device: torch.device) -> str | None:
    return _device_obstacle(device)


@functools.cache
def _device_obstacle(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    triton = importlib.import_module("triton")
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < _OLDEST_TRITON:
        oldest = ".".join(map(str, _OLDEST_TRITON))
        return f"triton {triton.__version__} is older than {oldest}, the oldest supported"
    if device.type == "cpu":
        if triton.knobs.runtime.interpret:
            return None
        return "x is on the CPU, where kernels run only under Triton's interpreter (TRITON_INTERPRET=1)"
    if device.type != "cuda":
        return f"x is on {device.type}, the kernels have been run on CUDA and ROCm only"
    try:
        properties = gpu_properties(device)
    except ValueError as error:
        reason = first_line(error.__cause__ or error)
        return f"x is on {device}, which this machine does not have: {reason}"
    capability = properties.major, properties.minor
    if torch.version.hip is None and capability < _OLDEST_CAPABILITY:
        return f"the GPU's compute capability is {capability[0]}.{capability[1]}, the oldest supported is 8.0"
    return None
