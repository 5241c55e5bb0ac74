"""Backend "native": the eager backend's algorithms, their float32 GEMMs on a CPU compiled from `linear.c`.

A GEMM copies its operands into panels anyway. While it does, these modulate W0, read permuted columns and drop
elements: no W_eff, no gathered or masked activations, no passes of their own. Few tokens are multiplied while W0 is
read, without packing.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from ...definition.dropout import MASK_ROWS, Dropout
from ...definition.packed import PackedAdapter
from .. import Gradients, eager
from ..eager import ALGORITHMS, modulated_weight
from .library import library, obstacle

__all__ = ["ALGORITHMS", "GRADIENT", "LINEAR", "UPDATE", "backward", "forward", "modulated_weight"]

LINEAR, UPDATE, GRADIENT = (f"smoa::compiled_{name}" for name in ("linear", "update", "gradient"))
"""What the compiled functions are called in a profile."""


class Mask(NamedTuple):
    """A dropout mask, drawn.

    Attributes:
        kept: int16 (T, ⌈C / 16⌉), a bit for each element of x that is not dropped.
        scale: what a kept element is multiplied by.
    """

    kept: Tensor
    scale: float


def forward(
    x: Tensor, bias: Tensor | None, adapter: PackedAdapter, algorithm: str, dropout: Dropout | None
) -> Tensor:
    """`y = x W0ᵀ + b + dropout(x) ΔWᵀ`, as :func:`eager.forward`; x (T, C) float32 on the CPU."""
    if not _fits(adapter, x, None):
        return eager.forward(x, bias, adapter, algorithm, dropout)
    if algorithm == "auto":
        algorithm = _choose(x, adapter, dropout)
    if algorithm == "merged":
        y = merged(x, adapter)
    elif algorithm == "expanded":
        y = expanded(x, adapter)
    else:
        y = split(x, adapter, dropout)
    return y if bias is None else y.add_(bias)


def backward(
    dy: Tensor, x: Tensor | None, adapter: PackedAdapter, dropout: Dropout | None, *, needs_x: bool
) -> Gradients:
    """Gradients (dX, dA, dB) of :func:`forward`, as :func:`eager.backward`; one mask serves them all."""
    if not _fits(adapter, x, dy):
        return eager.backward(dy, x, adapter, dropout, needs_x=needs_x)
    mask = None if dropout is None else _drawn(dropout, dy, adapter.weight.shape[1])
    dA, dB = (None, None) if x is None else factor_gradients(dy, x, adapter, mask)
    return input_gradient(dy, adapter, mask) if needs_x else None, dA, dB


def _fits(adapter: PackedAdapter, x: Tensor | None, dy: Tensor | None) -> bool:
    """Whether compiled code can run: an exported program, which names its backend, may meet another machine or dtype.

    Nor does it run for operands of other shapes, which it would follow beyond their end: torch's operators raise there.
    """
    rank, (rows, cols) = adapter.A.shape[0], adapter.weight.shape
    fits = adapter.A.shape == (rank, cols) and adapter.B.shape == (rows, rank)
    for given, width in ((x, cols), (dy, rows)):
        if given is not None:
            fits = fits and given.dtype == torch.float32 and given.is_cpu and given.shape[1] == width
    fits = fits and (x is None or dy is None or x.shape[0] == dy.shape[0])
    return fits and obstacle() is None


def _choose(x: Tensor, adapter: PackedAdapter, dropout: Dropout | None) -> str:
    """What "auto" means on this backend."""
    if dropout is not None:
        return "split"
    few = adapter.weight.stride(1) == 1 and library().smoa_few_fit(x.shape[0], adapter.A.shape[0])
    return "expanded" if few else "merged"


def merged(x: Tensor, adapter: PackedAdapter) -> Tensor:
    """`x W_effᵀ` (T, N)."""
    y = x.new_empty(x.shape[0], adapter.weight.shape[0])
    return _linear(x, adapter.weight, y, adapter) if x.numel() else y.zero_()


def expanded(x: Tensor, adapter: PackedAdapter) -> Tensor:
    """`x W_effᵀ` (T, N) of few tokens: makes W_eff in registers, a vector at a time, while it reads W0's rows.

    Where W0's columns are contiguous, not its rows, this is :func:`merged`.
    """
    if adapter.weight.stride(1) != 1:
        return merged(x, adapter)
    y = x.new_empty(x.shape[0], adapter.weight.shape[0])
    row_index, _, row_offsets, _, ranks = _blocks(adapter)
    if not x.numel() or not y.numel():
        return y.zero_()
    code, threads, count = library(), torch.get_num_threads(), adapter.partition.num_blocks
    columns, col_block = adapter.weight.shape[1], dense(adapter.partition.col_block, torch.int32)
    if col_block.numel() != columns or not code.smoa_labels_fit(
        0, columns, None, col_block.data_ptr(), 1, count
    ):
        raise _no_fit(adapter.weight, count)
    x, A, B = with_rows(x), with_rows(adapter.A.to(torch.float32)), adapter.B.to(torch.float32)
    workspace = x.new_empty(code.smoa_few_workspace(A.shape[0], threads))
    with named(LINEAR):
        code.smoa_few(
            x.shape[0], *adapter.weight.shape, x.data_ptr(), x.stride(0), adapter.weight.data_ptr(),
            adapter.weight.stride(0), row_index.data_ptr(), row_offsets.data_ptr(), col_block.data_ptr(),
            count, ranks.data_ptr(), A.shape[0], A.data_ptr(), A.stride(0), B.data_ptr(),
            *B.stride(), adapter.scaling.item(), y.data_ptr(), workspace.data_ptr(), threads,
        )  # fmt: skip
    return y


def split(x: Tensor, adapter: PackedAdapter, dropout: Dropout | None) -> Tensor:
    """`x W0ᵀ + dropout(x) ΔWᵀ` (T, N)."""
    mask = None if dropout is None else _drawn(dropout, x, x.shape[1])
    return _linear(x, adapter.weight, _update(x, adapter, x_mask=mask))


def input_gradient(dy: Tensor, adapter: PackedAdapter, mask: Mask | None) -> Tensor:
    """`dX = dY W0 + dropoutᵀ(dY ΔW)`; merged, or expanded for few tokens, where there is no mask."""
    if mask is not None:
        return _linear(dy, adapter.weight.T, _update(dy, adapter.T, y_mask=mask))
    transposed = adapter.T
    return (expanded if _choose(dy, transposed, None) == "expanded" else merged)(dy, transposed)


def _drawn(dropout: Dropout, tokens: Tensor, columns: int) -> Mask:
    """The mask of x, which has the rows of `tokens`."""
    kept, levels = (
        tokens.new_empty(tokens.shape[0], -(-columns // 16), dtype=torch.int16),
        dropout.levels(columns),
    )
    for some in kept.split(MASK_ROWS):
        drawn = levels(some.shape[0])
        library().smoa_keep(
            *drawn.shape, drawn.data_ptr(), drawn.stride(0), dropout.least_kept, some.data_ptr()
        )
    return Mask(kept, dropout.scale)


def _linear(x: Tensor, weight: Tensor, y: Tensor, adapter: PackedAdapter | None = None) -> Tensor:
    """Write `x W_effᵀ` to y, or add `x W0ᵀ` to it where there is no adapter; returns y."""
    if not x.numel() or not y.numel():
        return y
    code, threads = library(), torch.get_num_threads()
    x, weight = with_rows(x), _along_memory(weight)
    rank, A, B, scaling = 0, weight, weight, 0.0
    blocks: tuple[int | None, int | None, int, int | None] = None, None, 0, None
    if adapter is not None:
        A, B, p = adapter.A.to(torch.float32), adapter.B.to(torch.float32), adapter.partition
        rank, scaling = A.shape[0], adapter.scaling.item()
        label = torch.uint8 if p.row_block.dtype == p.col_block.dtype == torch.uint8 else torch.int32
        row_block, col_block = dense(p.row_block, label), dense(p.col_block, label)
        ranks = dense(adapter.ranks, torch.int32)
        wide, count = int(label == torch.int32), p.num_blocks
        fits = (row_block.numel(), col_block.numel(), ranks.numel()) == (*weight.shape, count)
        if not fits or not code.smoa_labels_fit(
            *weight.shape, row_block.data_ptr(), col_block.data_ptr(), wide, count
        ):
            raise _no_fit(weight, count)
        blocks = row_block.data_ptr(), col_block.data_ptr(), wide, ranks.data_ptr()
    workspace = x.new_empty(code.smoa_linear_workspace(x.shape[0], weight.shape[1], rank, threads))
    with named(LINEAR):
        code.smoa_linear(
            x.shape[0], *weight.shape, x.data_ptr(), x.stride(0), weight.data_ptr(), *weight.stride(), *blocks, rank,
            A.data_ptr(), *A.stride(), B.data_ptr(), *B.stride(), scaling, y.data_ptr(), adapter is None,
            workspace.data_ptr(), threads,
        )  # fmt: skip
    return y


def _update(
    x: Tensor,
    adapter: PackedAdapter,
    x_mask: Mask | None = None,
    y_mask: Mask | None = None,
) -> Tensor:
    """`x ΔWᵀ` (T, N), with a mask on x or on the result."""
    mask = x_mask or y_mask
    scale = 1.0 if mask is None else mask.scale
    y = x.new_empty(x.shape[0], adapter.weight.shape[0])
    blocks, (code, threads) = _blocks(adapter), (library(), torch.get_num_threads())
    if not x.numel() or not y.numel():
        return y.zero_()
    x, weight = with_rows(x), _along_memory(adapter.weight)
    A, B = adapter.A.to(torch.float32), adapter.B.to(torch.float32)
    count, rank, scaling = adapter.partition.num_blocks, A.shape[0], scale * adapter.scaling.item()
    *indices, ranks = (tensor.data_ptr() for tensor in blocks)
    workspace = x.new_empty(
        code.smoa_update_workspace(x.shape[0], *weight.shape, *indices[2:], count, rank, threads)
    )
    with named(UPDATE):
        code.smoa_update(
            x.shape[0], *weight.shape, x.data_ptr(), x.stride(0), _kept(x_mask), weight.data_ptr(),
            *weight.stride(), *indices, count, adapter.partition.is_contiguous, ranks, rank, A.data_ptr(), *A.stride(),
            B.data_ptr(), *B.stride(), scaling, y.data_ptr(), _kept(y_mask), workspace.data_ptr(), threads,
        )  # fmt: skip
    return y


def factor_gradients(
    dy: Tensor, x: Tensor, adapter: PackedAdapter, mask: Mask | None
) -> tuple[Tensor, Tensor]:
    """(dA, dB) by `gradient.h`: `H_k = s·(dY_kᵀ dropout(x)_k) ∘ W0_k`, `dA_k = B_kᵀ H_k`, `dB_k = H_k A_kᵀ`.

    Padding rows get zeros.
    """
    scale = 1.0 if mask is None else mask.scale
    blocks, (code, threads) = _blocks(adapter), (library(), torch.get_num_threads())
    A, B = dense(adapter.A, torch.float32), dense(adapter.B, torch.float32)
    dA, dB = A.new_zeros(A.shape if threads == 1 else (threads, *A.shape)), torch.zeros_like(B)
    if x.shape[0]:
        dy, x, weight = with_rows(dy), with_rows(x), _along_memory(adapter.weight)
        count, rank, scaling = adapter.partition.num_blocks, A.shape[0], scale * adapter.scaling.item()
        *indices, ranks = (tensor.data_ptr() for tensor in blocks)
        floats = code.smoa_gradient_workspace(x.shape[0], *indices[2:], count, rank, threads)
        workspace = x.new_empty(floats)
        with named(GRADIENT):
            code.smoa_gradient(
                x.shape[0], *weight.shape, dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0), _kept(mask),
                weight.data_ptr(), *weight.stride(), *indices, count, adapter.partition.is_contiguous, ranks, rank,
                A.data_ptr(), B.data_ptr(), scaling, dA.data_ptr(), dB.data_ptr(), workspace.data_ptr(), threads,
            )  # fmt: skip
    dA = dA if threads == 1 else dA.sum(0)
    return (dA, dB) if adapter.A.dtype == dA.dtype else (dA.to(adapter.A.dtype), dB.to(adapter.A.dtype))


def _blocks(adapter: PackedAdapter) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Row and column indices, their offsets, and the ranks, as the compiled code reads them.

    Raises:
        ValueError: they do not fit the weight.
    """
    p, count = adapter.partition, adapter.partition.num_blocks
    row_index, col_index = dense(p.row_index, torch.int64), dense(p.col_index, torch.int64)
    row_offsets, col_offsets = dense(p.row_offsets, torch.int32), dense(p.col_offsets, torch.int32)
    found = row_index, col_index, row_offsets, col_offsets, dense(adapter.ranks, torch.int32)
    indices = (one.data_ptr() for one in found[:4])
    if tuple(one.numel() for one in found) != (*adapter.weight.shape, count + 1, count + 1, count) or not (
        library().smoa_indices_fit(*adapter.weight.shape, *indices, count)
    ):
        raise _no_fit(adapter.weight, count)
    return found


def _kept(mask: Mask | None) -> int | None:
    """The address of a mask's bits; without a mask nothing is dropped."""
    return None if mask is None else mask.kept.data_ptr()


def _no_fit(weight: Tensor, num_blocks: int) -> ValueError:
    """The error where torch's operators would meet an index out of range, and compiled code would read on."""
    return ValueError(
        f"partition must have all rows and columns of weight {tuple(weight.shape)} in its {num_blocks} blocks, got "
        "labels, indices or offsets that do not"
    )


def named(name: str) -> AbstractContextManager[object]:
    """Name what runs within for the profiler, where one is on: by itself it sees operators only."""
    return record_function(name) if torch._C._autograd._profiler_enabled() else nullcontext()


def _along_memory(matrix: Tensor) -> Tensor:
    """The matrix where one of its strides is 1, else a contiguous copy."""
    return matrix if 1 in matrix.stride() else matrix.contiguous()


def with_rows(matrix: Tensor) -> Tensor:
    """The matrix where its rows are contiguous, else a copy."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor contiguous and in `dtype`: mostly itself, which is asked first because torch's conversions cost."""
    return tensor if tensor.dtype == dtype and tensor.is_contiguous() else tensor.to(dtype).contiguous()
