"""Backend "native": the eager one, whose float32 GEMMs on a CPU are those of `native/linear.c`.

They modulate W0, read permuted columns and drop elements while they copy panels, which every GEMM does: no W_eff, no
gathered or masked activations, no passes of their own. Few tokens are multiplied while W0 is read, without packing.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.profiler import record_function

from ...definition.dropout import ROWS, Dropout
from ...definition.packed import PackedAdapter
from .. import eager
from .library import library, obstacle

__all__ = ["ALGORITHMS", "GRADIENT", "LINEAR", "UPDATE", "backward", "forward"]

ALGORITHMS = eager.ALGORITHMS
LINEAR, UPDATE, GRADIENT = (f"smoa::compiled_{name}" for name in ("linear", "update", "gradient"))
"""What the compiled functions are called in a profile."""


def forward(
    x: Tensor, bias: Tensor | None, adapter: PackedAdapter, algorithm: str, dropout: Dropout | None
) -> Tensor:
    """`y = x W0ᵀ + b + dropout(x) ΔWᵀ`, as :func:`eager.forward`; x (T, C) float32 on the CPU."""
    return eager.forward(x, bias, adapter, algorithm, dropout, gemms=_gemms(adapter, x, None))


def backward(
    dy: Tensor, x: Tensor | None, adapter: PackedAdapter, dropout: Dropout | None, *, needs_x: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (dX, dA, dB) of :func:`forward`, as :func:`eager.backward`."""
    return eager.backward(dy, x, adapter, dropout, needs_x=needs_x, gemms=_gemms(adapter, x, dy))


def _gemms(adapter: PackedAdapter, x: Tensor | None, dy: Tensor | None) -> eager.Gemms:
    """Torch's where an exported program, which names its backend, meets another machine, device or dtype.

    Torch's too for operands of other shapes, which compiled code would follow beyond their end: they raise there.
    """
    rank, (rows, cols) = adapter.A.shape[0], adapter.weight.shape
    fits = adapter.A.shape == (rank, cols) and adapter.B.shape == (rows, rank)
    for given, width in ((x, cols), (dy, rows)):
        if given is not None:
            fits = fits and given.dtype == torch.float32 and given.is_cpu and given.shape[1] == width
    fits = fits and (x is None or dy is None or x.shape[0] == dy.shape[0])
    return GEMMS if fits and obstacle() is None else eager.TORCH


def choose(x: Tensor, adapter: PackedAdapter, dropout: Dropout | None) -> str:
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
    """The same for few tokens: W_eff a vector at a time, in registers, while W0's rows are read.

    Of a W0 whose columns are contiguous it is :func:`merged`.
    """
    if adapter.weight.stride(1) != 1:
        return merged(x, adapter)
    y = x.new_empty(x.shape[0], adapter.weight.shape[0])
    row_index, _, row_offsets, _, ranks = _blocks(adapter)
    if not x.numel() or not y.numel():
        return y.zero_()
    code, threads, count = library(), torch.get_num_threads(), adapter.partition.num_blocks
    columns, col_block = adapter.weight.shape[1], _dense(adapter.partition.col_block, torch.int32)
    if col_block.numel() != columns or not code.smoa_labels_fit(
        0, columns, None, col_block.data_ptr(), 1, count
    ):
        raise _no_fit(adapter.weight, count)
    x, A, B = _rows(x), _rows(adapter.A.to(torch.float32)), adapter.B.to(torch.float32)
    workspace = x.new_empty(code.smoa_few_workspace(A.shape[0], threads))
    with _named(LINEAR):
        code.smoa_few(
            x.shape[0], *adapter.weight.shape, x.data_ptr(), x.stride(0), adapter.weight.data_ptr(),
            adapter.weight.stride(0), row_index.data_ptr(), row_offsets.data_ptr(), col_block.data_ptr(),
            count, ranks.data_ptr(), A.shape[0], A.data_ptr(), A.stride(0), B.data_ptr(),
            *B.stride(), adapter.scaling.item(), y.data_ptr(), workspace.data_ptr(), threads,
        )  # fmt: skip
    return y


def split(x: Tensor, adapter: PackedAdapter, dropout: Dropout | None) -> Tensor:
    """`x W0ᵀ + dropout(x) ΔWᵀ` (T, N)."""
    keep, scale = (None, 1.0) if dropout is None else (_kept(x, dropout), dropout.scale)
    return _linear(x, adapter.weight, _update(x, adapter, scale, x_keep=keep))


def input_gradient(dy: Tensor, adapter: PackedAdapter) -> Tensor:
    """dX without dropout."""
    transposed = adapter.T
    return (expanded if choose(dy, transposed, None) == "expanded" else merged)(dy, transposed)


def gradient(dy: Tensor, x: Tensor, adapter: PackedAdapter) -> tuple[Tensor, Tensor]:
    """(dA, dB); padding rows get zeros."""
    return _gradient(dy, x, adapter, 1.0, None)


def dropout_backward(
    dy: Tensor, x: Tensor | None, adapter: PackedAdapter, dropout: Dropout, needs_x: bool
) -> eager.Gradients:
    """All gradients of :func:`split`: the mask is drawn once, and kept as one bit for each element of x."""
    keep = _kept(dy if x is None else x, dropout, adapter.weight.shape[1])
    dA, dB = (None, None) if x is None else _gradient(dy, x, adapter, dropout.scale, keep)
    if not needs_x:
        return None, dA, dB
    dx = _update(dy, adapter.T, dropout.scale, y_keep=keep)
    return _linear(dy, adapter.weight.T, dx), dA, dB


def _kept(x: Tensor, dropout: Dropout, columns: int | None = None) -> Tensor:
    """A bit for each element that is not dropped of x's tokens and (unless given) columns, in words of 16."""
    columns = x.shape[1] if columns is None else columns
    keep, levels = x.new_empty(x.shape[0], -(-columns // 16), dtype=torch.int16), dropout.levels(columns)
    for some in keep.split(ROWS):
        drawn = levels(some.shape[0])
        library().smoa_keep(
            *drawn.shape, drawn.data_ptr(), drawn.stride(0), dropout.least_kept, some.data_ptr()
        )
    return keep


def _linear(x: Tensor, weight: Tensor, y: Tensor, adapter: PackedAdapter | None = None) -> Tensor:
    """y, which has become `x W_effᵀ`, or `y + x W0ᵀ` without an adapter."""
    if not x.numel() or not y.numel():
        return y
    code, threads = library(), torch.get_num_threads()
    x, weight = _rows(x), _along_memory(weight)
    rank, A, B, scaling = 0, weight, weight, 0.0
    blocks: tuple[int | None, int | None, int, int | None] = None, None, 0, None
    if adapter is not None:
        A, B, p = adapter.A.to(torch.float32), adapter.B.to(torch.float32), adapter.partition
        rank, scaling = A.shape[0], adapter.scaling.item()
        label = torch.uint8 if p.row_block.dtype == p.col_block.dtype == torch.uint8 else torch.int32
        row_block, col_block = _dense(p.row_block, label), _dense(p.col_block, label)
        ranks = _dense(adapter.ranks, torch.int32)
        wide, count = int(label == torch.int32), p.num_blocks
        fits = (row_block.numel(), col_block.numel(), ranks.numel()) == (*weight.shape, count)
        if not fits or not code.smoa_labels_fit(
            *weight.shape, row_block.data_ptr(), col_block.data_ptr(), wide, count
        ):
            raise _no_fit(weight, count)
        blocks = row_block.data_ptr(), col_block.data_ptr(), wide, ranks.data_ptr()
    workspace = x.new_empty(code.smoa_linear_workspace(x.shape[0], weight.shape[1], rank, threads))
    with _named(LINEAR):
        code.smoa_linear(
            x.shape[0], *weight.shape, x.data_ptr(), x.stride(0), weight.data_ptr(), *weight.stride(), *blocks, rank,
            A.data_ptr(), *A.stride(), B.data_ptr(), *B.stride(), scaling, y.data_ptr(), adapter is None,
            workspace.data_ptr(), threads,
        )  # fmt: skip
    return y


def _update(
    x: Tensor,
    adapter: PackedAdapter,
    scale: float,
    x_keep: Tensor | None = None,
    y_keep: Tensor | None = None,
) -> Tensor:
    """`scale x ΔWᵀ` (T, N), but for what is not kept of x or of it."""
    y = x.new_empty(x.shape[0], adapter.weight.shape[0])
    blocks, (code, threads) = _blocks(adapter), (library(), torch.get_num_threads())
    if not x.numel() or not y.numel():
        return y.zero_()
    x, weight = _rows(x), _along_memory(adapter.weight)
    A, B = adapter.A.to(torch.float32), adapter.B.to(torch.float32)
    count, rank, scaling = adapter.partition.num_blocks, A.shape[0], scale * adapter.scaling.item()
    *indices, ranks = (tensor.data_ptr() for tensor in blocks)
    workspace = x.new_empty(
        code.smoa_update_workspace(x.shape[0], *weight.shape, *indices[2:], count, rank, threads)
    )
    with _named(UPDATE):
        code.smoa_update(
            x.shape[0], *weight.shape, x.data_ptr(), x.stride(0), _pointer(x_keep), weight.data_ptr(),
            *weight.stride(), *indices, count, ranks, rank, A.data_ptr(), *A.stride(), B.data_ptr(), *B.stride(),
            scaling, y.data_ptr(), _pointer(y_keep), workspace.data_ptr(), threads,
        )  # fmt: skip
    return y


def _gradient(
    dy: Tensor, x: Tensor, adapter: PackedAdapter, scale: float, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(dA, dB) times `scale`, of what is kept of x."""
    blocks, (code, threads) = _blocks(adapter), (library(), torch.get_num_threads())
    A, B = _dense(adapter.A, torch.float32), _dense(adapter.B, torch.float32)
    dA, dB = A.new_zeros(A.shape if threads == 1 else (threads, *A.shape)), torch.zeros_like(B)
    if x.shape[0]:
        dy, x, weight = _rows(dy), _rows(x), _along_memory(adapter.weight)
        count, rank, scaling = adapter.partition.num_blocks, A.shape[0], scale * adapter.scaling.item()
        *indices, ranks = (tensor.data_ptr() for tensor in blocks)
        floats = code.smoa_gradient_workspace(x.shape[0], *indices[2:], count, rank, threads)
        workspace = x.new_empty(floats)
        with _named(GRADIENT):
            code.smoa_gradient(
                x.shape[0], *weight.shape, dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0), _pointer(keep),
                weight.data_ptr(), *weight.stride(), *indices, count, ranks, rank, A.data_ptr(), B.data_ptr(), scaling,
                dA.data_ptr(), dB.data_ptr(), workspace.data_ptr(), threads,
            )  # fmt: skip
    dA = dA if threads == 1 else dA.sum(0)
    return (dA, dB) if adapter.A.dtype == dA.dtype else (dA.to(adapter.A.dtype), dB.to(adapter.A.dtype))


GEMMS = eager.Gemms(choose, merged, expanded, split, input_gradient, gradient, dropout_backward)
"""What :mod:`eager` multiplies with here."""


def _blocks(adapter: PackedAdapter) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Indices and offsets of rows and columns, and the ranks, as the compiled code reads and follows them.

    Raises:
        ValueError: they are not those of the weight.
    """
    p, count = adapter.partition, adapter.partition.num_blocks
    row_index, col_index = _dense(p.row_index, torch.int64), _dense(p.col_index, torch.int64)
    row_offsets, col_offsets = _dense(p.row_offsets, torch.int32), _dense(p.col_offsets, torch.int32)
    found = row_index, col_index, row_offsets, col_offsets, _dense(adapter.ranks, torch.int32)
    indices = (one.data_ptr() for one in found[:4])
    if tuple(one.numel() for one in found) != (*adapter.weight.shape, count + 1, count + 1, count) or not (
        library().smoa_indices_fit(*adapter.weight.shape, *indices, count)
    ):
        raise _no_fit(adapter.weight, count)
    return found


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _no_fit(weight: Tensor, num_blocks: int) -> ValueError:
    """What others find out by an index that is out of range, where compiled code would read on."""
    return ValueError(
        f"partition must have all rows and columns of weight {tuple(weight.shape)} in its {num_blocks} blocks, got "
        "labels, indices or offsets that do not"
    )


def _named(name: str) -> AbstractContextManager[object]:
    """Seen by the profiler, where one runs: it knows operators, not what is called beside them."""
    return record_function(name) if torch._C._autograd._profiler_enabled() else nullcontext()


def _along_memory(matrix: Tensor) -> Tensor:
    """With one stride 1: a copy where neither is."""
    return matrix if 1 in matrix.stride() else matrix.contiguous()


def _rows(matrix: Tensor) -> Tensor:
    """With contiguous rows."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As the compiled code reads it: mostly itself, which is asked first because torch's conversions cost more."""
    return tensor if tensor.dtype == dtype and tensor.is_contiguous() else tensor.to(dtype).contiguous()
