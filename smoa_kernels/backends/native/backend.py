"""Backend "native": the eager backend's algorithms on a CPU, compiled from `linear.c`.

A GEMM copies its operands into panels anyway. While it does, these modulate W0, read permuted columns and drop
elements: no W_eff, no gathered or masked activations, no passes of their own. Few tokens are multiplied while W0 is
read, without packing. AMX multiplies where there is one: float32 as three bfloat16 thirds (`thirds.h`). bfloat16 has
calls of its own, with AMX or AVX512-BF16 (`bf16.py`). Where torch's GEMM is faster, it multiplies (`torch_gemms.py`);
where it has none in half precision, halves are widened as they are packed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...definition.dropout import Dropout
from ...definition.packed import PackedAdapter
from ...definition.precision import gemm_is_ieee, has_gemm
from .. import Gradients, eager
from ..eager import ALGORITHMS, modulated_weight
from ..pages import in_large_pages, workspace
from . import bf16, torch_gemms
from .layer import Layer
from .library import library, obstacle
from .operands import KINDS, Mask, along_memory, drawn, kept_by, named, with_rows
from .torch_gemms import BLOCKS

__all__ = ["ALGORITHMS", "BLOCKS", "GRADIENT", "LINEAR", "UPDATE", "backward", "forward", "modulated_weight"]

LINEAR, UPDATE, GRADIENT = (f"smoa::compiled_{name}" for name in ("linear", "update", "gradient"))
"""What the compiled functions are called in a profile."""


def forward(
    x: Tensor, bias: Tensor | None, adapter: PackedAdapter, algorithm: str, dropout: Dropout | None
) -> Tensor:
    """`y = x W0ᵀ + b + dropout(x) ΔWᵀ`, as :func:`eager.forward`; x (T, C) on the CPU."""
    if not _fits(adapter, x, None, bias):
        return eager.forward(x, bias, adapter, algorithm, dropout)
    if algorithm == "auto":
        algorithm = _choose(x, adapter, dropout)
    if algorithm == "expanded":
        return expanded(x, adapter, bias)
    if algorithm == "merged":
        return _finished(merged(x, adapter), bias, x.dtype)
    mask = None if dropout is None else drawn(dropout, x, x.shape[1])
    if bf16.multiplies(x, adapter):
        return bf16.split(x, bias, adapter, mask)
    return _finished(split(x, adapter, mask), bias, x.dtype)


def backward(
    dy: Tensor, x: Tensor | None, adapter: PackedAdapter, dropout: Dropout | None, *, needs_x: bool
) -> Gradients:
    """Gradients (dX, dA, dB) of :func:`forward`, as :func:`eager.backward`; one mask serves them all."""
    if not _fits(adapter, x, dy, None):
        return eager.backward(dy, x, adapter, dropout, needs_x=needs_x)
    mask = None if dropout is None else drawn(dropout, dy, adapter.weight.shape[1])
    if bf16.multiplies(dy, adapter):
        return bf16.backward(dy, x, adapter, mask, needs_x=needs_x)
    if torch_is_faster(dy) and (mask is None or dy.dtype != torch.float32):
        return torch_gemms.backward(dy, x, adapter, mask, needs_x=needs_x)
    dA, dB = (None, None) if x is None else factor_gradients(dy, x, adapter, mask)
    return input_gradient(dy, adapter, mask).to(dy.dtype) if needs_x else None, dA, dB


def torch_is_faster(tokens: Tensor) -> bool:
    """Whether torch's GEMM, and a W_eff in memory, take less time for x or dY than the compiled GEMM, which needs none.

    In float32 it never does where there is AMX, by which the compiled one multiplies. torch's must multiply in float32:
    a compiled or exported program names its backend, and may meet another setting later.
    """
    if tokens.dtype != torch.float32:
        return has_gemm(tokens.dtype)
    return not library().smoa_linear_fit(tokens.shape[0]) and gemm_is_ieee(torch.float32, "cpu")


def _fits(adapter: PackedAdapter, x: Tensor | None, dy: Tensor | None, bias: Tensor | None) -> bool:
    """Whether compiled code can run: an exported program, which names its backend, may meet another machine or dtype.

    Nor does it run for operands of other shapes, which it would follow beyond their end: torch's operators raise there.
    """
    rank, (rows, cols) = adapter.A.shape[0], adapter.weight.shape
    fits = adapter.A.shape == (rank, cols) and adapter.B.shape == (rows, rank)
    for given, width in ((x, cols), (dy, rows)):
        if given is not None:
            fits = fits and given.dtype == adapter.weight.dtype and given.is_cpu and given.shape[1] == width
    fits = fits and (x is None or dy is None or x.shape[0] == dy.shape[0])
    if bias is not None:
        fits = fits and bias.dtype == adapter.weight.dtype and bias.is_cpu and bias.shape == (rows,)
    fits = fits and adapter.weight.dtype in KINDS and adapter.A.dtype in KINDS
    return fits and adapter.A.dtype == adapter.B.dtype and obstacle() is None


def _choose(x: Tensor, adapter: PackedAdapter, dropout: Dropout | None) -> str:
    """What "auto" means on this backend."""
    if dropout is not None:
        return "split"
    few = adapter.weight.stride(1) == 1 and library().smoa_few_fit(x.shape[0], adapter.A.shape[0])
    if few and not bf16.is_faster(x, adapter):
        return "expanded"
    # A W_eff that is rounded to half precision, for torch's GEMM, loses an update smaller than W0's last bit.
    return "split" if x.dtype != torch.float32 and torch_is_faster(x) else "merged"


def _finished(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`y + b` in the dtype of x; a float32 y is rounded here, once."""
    return (y if bias is None else y.add_(bias)).to(dtype)


def merged(x: Tensor, adapter: PackedAdapter) -> Tensor:
    """`x W_effᵀ` (T, N), by torch's GEMM in x's dtype, else in float32."""
    if torch_is_faster(x):
        return torch_gemms.merged(x, adapter)
    y = _result(x, adapter)
    return _linear(x, adapter.weight, y, adapter) if x.numel() else y.zero_()


def expanded(x: Tensor, adapter: PackedAdapter, bias: Tensor | None = None) -> Tensor:
    """`x W_effᵀ + b` (T, N) of few tokens: makes W_eff in registers, a vector at a time, while it reads W0's rows.

    Where W0's columns are contiguous, not its rows, this is :func:`merged`.
    """
    if adapter.weight.stride(1) != 1:
        return _finished(merged(x, adapter), bias, x.dtype)
    A, B = with_rows(adapter.A.to(torch.float32)), adapter.B.to(torch.float32)
    layer = Layer(adapter.weight).adapt(adapter, A, B).index(adapter).label(adapter, rows=False, wide=True)
    y = x.new_empty(x.shape[0], layer.rows, dtype=torch.float32)
    if not x.numel() or not y.numel():
        return _finished(y.zero_(), bias, x.dtype)
    code, threads, x = library(), torch.get_num_threads(), with_rows(x.to(torch.float32))
    room = workspace(x, code.smoa_few_workspace(layer, threads))
    with named(LINEAR):
        code.smoa_few(
            layer, x.shape[0], x.data_ptr(), x.stride(0), y.data_ptr(), False, room.data_ptr(), threads
        )
    return _finished(y, bias, adapter.weight.dtype)


def split(x: Tensor, adapter: PackedAdapter, mask: Mask | None) -> Tensor:
    """`x W0ᵀ + dropout(x) ΔWᵀ` (T, N), by torch's GEMMs in x's half type, else in float32."""
    if x.dtype != torch.float32 and torch_is_faster(x):
        return torch_gemms.split(x, adapter, mask)
    return _linear(x, adapter.weight, _update(x, adapter, x_mask=mask))


def input_gradient(dy: Tensor, adapter: PackedAdapter, mask: Mask | None) -> Tensor:
    """`dX = dY W0 + dropoutᵀ(dY ΔW)`; merged, or expanded for few tokens, where there is no mask."""
    if mask is not None:
        return _linear(dy, adapter.weight.T, _update(dy, adapter.T, y_mask=mask))
    transposed = adapter.T
    return (expanded if _choose(dy, transposed, None) == "expanded" else merged)(dy, transposed)


def _result(x: Tensor, adapter: PackedAdapter) -> Tensor:
    """Room for y (T, N) in float32, in which sums are added up."""
    return in_large_pages(x.new_empty(x.shape[0], adapter.weight.shape[0], dtype=torch.float32))


def _linear(x: Tensor, weight: Tensor, y: Tensor, adapter: PackedAdapter | None = None) -> Tensor:
    """Write `x W_effᵀ` to y, or add `x W0ᵀ` to it where there is no adapter; returns y."""
    if not x.numel() or not y.numel():
        return y
    code, threads, x, layer = library(), torch.get_num_threads(), with_rows(x), Layer(along_memory(weight))
    if adapter is not None:
        layer.adapt(adapter, adapter.A.to(torch.float32), adapter.B.to(torch.float32)).label(adapter)
    room = workspace(x, code.smoa_linear_workspace(layer, x.shape[0], threads))
    with named(LINEAR):
        code.smoa_linear(
            layer, x.shape[0], x.data_ptr(), KINDS[x.dtype], x.stride(0), y.data_ptr(), adapter is None,
            room.data_ptr(), threads,
        )  # fmt: skip
    return y


def _update(
    x: Tensor,
    adapter: PackedAdapter,
    x_mask: Mask | None = None,
    y_mask: Mask | None = None,
) -> Tensor:
    """`x ΔWᵀ` (T, N) in float32, with a mask on x or on the result."""
    code, threads, y = library(), torch.get_num_threads(), _result(x, adapter)
    layer = _indexed(adapter, x_mask or y_mask)
    if not x.numel() or not y.numel():
        return y.zero_()
    x = with_rows(x)
    room = workspace(x, code.smoa_update_workspace(layer, x.shape[0], threads))
    with named(UPDATE):
        code.smoa_update(
            layer, x.shape[0], x.data_ptr(), KINDS[x.dtype], x.stride(0), kept_by(x_mask), y.data_ptr(),
            kept_by(y_mask), room.data_ptr(), threads,
        )  # fmt: skip
    return y


def factor_gradients(
    dy: Tensor, x: Tensor, adapter: PackedAdapter, mask: Mask | None
) -> tuple[Tensor, Tensor]:
    """(dA, dB) by `gradient.h`: `H_k = s·(dY_kᵀ dropout(x)_k) ∘ W0_k`, `dA_k = B_kᵀ H_k`, `dB_k = H_k A_kᵀ`.

    Padding rows get zeros.
    """
    code, threads = library(), torch.get_num_threads()
    layer, A, B = _indexed(adapter, mask), adapter.A, adapter.B
    dA = A.new_zeros(A.shape if threads == 1 else (threads, *A.shape), dtype=torch.float32)
    dB = B.new_zeros(B.shape, dtype=torch.float32)
    if x.shape[0]:
        dy, x = with_rows(dy), with_rows(x)
        room = workspace(x, code.smoa_gradient_workspace(layer, x.shape[0], threads))
        with named(GRADIENT):
            code.smoa_gradient(
                layer, x.shape[0], dy.data_ptr(), dy.stride(0), x.data_ptr(), KINDS[x.dtype], x.stride(0),
                kept_by(mask), dA.data_ptr(), dB.data_ptr(), room.data_ptr(), threads,
            )  # fmt: skip
    dA = dA if threads == 1 else dA.sum(0)
    return (dA, dB) if adapter.A.dtype == dA.dtype else (dA.to(adapter.A.dtype), dB.to(adapter.A.dtype))


def _indexed(adapter: PackedAdapter, mask: Mask | None) -> Layer:
    """The layer with its blocks' indices, and factors in float32; what a mask keeps is scaled."""
    A, B = adapter.A.to(torch.float32), adapter.B.to(torch.float32)
    scale = 1.0 if mask is None else mask.scale
    return Layer(along_memory(adapter.weight)).adapt(adapter, A, B, scale).index(adapter)
