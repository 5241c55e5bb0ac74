"""The ways of multiplying: a table of them, and which way a GEMM uses."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Precision:
    """One way of multiplying: how operands are stored and how their products round.

    Attributes:
        name: its name in options, tuning tables and audit records; Triton's of `dtype`, but for "tf32".
        dtype: of the operands in memory.
        ieee: the operands are multiplied in float32 or float64 as IEEE 754 defines them, so nothing of a float32 weight
            is lost.
    """

    name: str
    dtype: torch.dtype
    ieee: bool


PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {
        row.name: row
        for row in (
            Precision("bf16", torch.bfloat16, ieee=False),
            Precision("fp16", torch.float16, ieee=False),
            Precision("tf32", torch.float32, ieee=False),
            Precision("fp32", torch.float32, ieee=True),
            Precision("fp64", torch.float64, ieee=True),
        )
    }
)
"""Every way of multiplying, by name. "fp32" is IEEE float32."""

DTYPES = tuple(dict.fromkeys(row.dtype for row in PRECISIONS.values()))
"""Dtypes that a layer may compute in."""

KERNEL_PRECISIONS = tuple(name for name in PRECISIONS if name != "fp64")
"""Names of the precisions of the Triton kernels."""

KERNEL_DTYPES = tuple(dict.fromkeys(PRECISIONS[name].dtype for name in KERNEL_PRECISIONS))
"""Dtypes that the Triton kernels take."""

# Only float32 has a row for each value of `ieee`.
_ROWS = {(row.dtype, ieee): row for row in PRECISIONS.values() for ieee in (False, True)}
_ROWS |= {(row.dtype, row.ieee): row for row in PRECISIONS.values()}


def precision_of(dtype: torch.dtype, ieee: bool) -> Precision:
    """Find the row of operands in `dtype`; `ieee` decides between "tf32" and "fp32", and nothing else."""
    row = _ROWS.get((dtype, ieee))
    if row is None:
        raise ValueError(f"dtype must be one of {dtype_names(DTYPES)}, got {dtype}")
    return row


def dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    """Name dtypes in a message: "bfloat16, float16, float32"."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on where x is."""
    if not torch._C._is_any_autocast_enabled():  # a quarter of the time that a question for x's device takes
        return False
    # Meta tensors have no autocast, and asking whether a device has it breaks the graph in torch 2.11.
    return isinstance(x, Tensor) and not x.is_meta and torch.is_autocast_enabled(x.device.type)


_NOTHING = nullcontext()


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Turn autocast off on `tensor`'s device where it is on, so that products keep the operands' dtype."""
    return torch.autocast(tensor.device.type, enabled=False) if autocast_enabled(tensor) else _NOTHING


def gemm_is_ieee(dtype: torch.dtype, device_type: str) -> bool:
    """Whether a GEMM on operands of `dtype` multiplies them in IEEE float32 or float64.

    This decides between merged and split. TF32 (or bf16 in oneDNN) keeps as few bits of a float32 W_eff as half
    precision does.
    """
    if dtype != torch.float32:
        return (dtype, True) in _ROWS and _ROWS[dtype, True].ieee
    backend = {"cuda": "cuda", "cpu": "mkldnn"}.get(device_type)
    return backend is None or matmul_precision(backend) in ("ieee", "none")


def matmul_precision(backend: str) -> str:
    """`torch.backends.cuda.matmul.fp32_precision` in a third of its time; each pass of a layer asks for it."""
    return torch._C._get_fp32_precision_getter(backend, "matmul")


@contextmanager
def multiplied_in(precision: str) -> Iterator[None]:
    """Let PyTorch multiply float32 as one of `KERNEL_PRECISIONS` says: in TF32 or in IEEE."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@functools.cache
def has_gemm(dtype: torch.dtype) -> bool:
    """Whether torch has a GEMM of this half type for this CPU: oneDNN's, which needs more than AVX2.

    Without it torch multiplies in loops, a sixth as fast as its float32 GEMM, and for `dY W0` a fiftieth to a
    two-hundredth (128 to 2048 tokens, measured on CPU: AMD EPYC, family 25 model 1, AVX2, one thread).
    """
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    is_supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return is_supported is not None and bool(is_supported())


# These settings let cuBLAS round partial sums: if it splits a GEMM along C, it may store them in the result's dtype.
_REDUCTIONS = {
    torch.bfloat16: "allow_bf16_reduced_precision_reduction",
    torch.float16: "allow_fp16_reduced_precision_reduction",
}
# The setting belongs to the process, and backward runs in one thread per device. While a thread has changed it, no
# other may read it.
_setting = threading.RLock()


def bmm_in_float32(left: Tensor, right: Tensor) -> Tensor:
    """The batched product `left right` in at least float32. Of half types it is summed in float32 and not rounded.

    A GPU's library returns it so; where it does not, the operands are converted first.
    """
    # cuBLAS refuses to sum float16 in float16 for a float32 result.
    refused = left.dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation
    if left.itemsize == 2 and not refused and _returns_float32(left.device.type):
        return torch.bmm(left, right, out_dtype=torch.float32)
    if left.itemsize == 2:  # a call of `to` that changes nothing still takes a microsecond
        left, right = left.float(), right.float()
    return torch.bmm(left, right)


@functools.cache
def _returns_float32(device_type: str) -> bool:
    """Whether torch's batched product of half types has a float32 result on such devices."""
    key = {"cuda": "CUDA", "xpu": "XPU"}.get(device_type)  # AMD's GPUs are "cuda" too
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key("aten::bmm.dtype", key)


def accumulate(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`y += x weightᵀ` in place, y + x weightᵀ rounded once; returns y.

    y is the adapter's output, small beside the product. On a GPU, cuBLAS may by default round partial sums of the
    product to y's half precision and add y to a single sum, which would then hide it (docs/numerics.md).
    """
    name = _REDUCTIONS.get(y.dtype)
    if name is None or not y.is_cuda:
        return y.addmm_(x, weight.T)
    matmul: Any = torch.backends.cuda.matmul
    with _setting:
        if not getattr(matmul, name):
            return y.addmm_(x, weight.T)
        setattr(matmul, name, False)
        try:
            return y.addmm_(x, weight.T)
        finally:
            setattr(matmul, name, True)
