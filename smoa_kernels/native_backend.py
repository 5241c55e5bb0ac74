"""Backend "native": the eager one, whose float32 GEMMs on a CPU are those of `native/linear.c`.

They modulate W0 and read permuted columns while they copy panels, which every GEMM does: no W_eff, no gathered
activations, no passes of their own. What has no such form, few tokens and ΔW under dropout, stays torch's.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.profiler import record_function

from . import eager
from .dropout import Dropout
from .native import library, obstacle
from .packed import PackedAdapter

__all__ = ["ALGORITHMS", "GRADIENT", "LINEAR", "backward", "forward"]

ALGORITHMS = eager.ALGORITHMS
LINEAR, GRADIENT = "smoa::compiled_linear", "smoa::compiled_gradient"
"""What the compiled functions are called in a profile."""


def forward(
    x: Tensor, bias: Tensor | None, adapter: PackedAdapter, algorithm: str, dropout: Dropout | None
) -> Tensor:
    """`y = x W0ᵀ + b + dropout(x) ΔWᵀ`, as :func:`eager.forward`; x (T, C) float32 on the CPU."""
    return eager.forward(x, bias, adapter, algorithm, dropout, gemms=_gemms(x))


def backward(
    dy: Tensor, x: Tensor | None, adapter: PackedAdapter, dropout: Dropout | None, *, needs_x: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (dX, dA, dB) of :func:`forward`, as :func:`eager.backward`."""
    return eager.backward(dy, x, adapter, dropout, needs_x=needs_x, gemms=_gemms(dy))


def _gemms(x: Tensor) -> eager.Gemms:
    """Torch's where an exported program, which names its backend, meets another machine, device or dtype."""
    return GEMMS if x.dtype == torch.float32 and x.is_cpu and obstacle() is None else eager.TORCH


def merged(x: Tensor, adapter: PackedAdapter) -> Tensor:
    """`x W_effᵀ` (T, N)."""
    y = x.new_empty(x.shape[0], adapter.weight.shape[0])
    if not x.numel():
        return y.zero_()
    _linear(x, adapter.weight, y, adapter)
    return y


def add_base(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`y + x W0ᵀ`, written over y (T, N)."""
    if x.numel():
        _linear(x, weight, y, None)
    return y


def _linear(x: Tensor, weight: Tensor, y: Tensor, adapter: PackedAdapter | None) -> None:
    """`y = x W_effᵀ`, or `y += x W0ᵀ` without an adapter; some tokens, some columns."""
    code, threads = library(), torch.get_num_threads()
    x, weight = _rows(x), _along_memory(weight)
    if not y.numel():
        return
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


def gradient(dy: Tensor, x: Tensor, adapter: PackedAdapter) -> tuple[Tensor, Tensor]:
    """(dA, dB); padding rows get zeros."""
    code, threads, p = library(), torch.get_num_threads(), adapter.partition
    weight, ranks = _along_memory(adapter.weight), _dense(adapter.ranks, torch.int32)
    A, B = _dense(adapter.A, torch.float32), _dense(adapter.B, torch.float32)
    dA, dB = A.new_zeros(A.shape if threads == 1 else (threads, *A.shape)), torch.zeros_like(B)
    if x.shape[0]:
        dy, x = _rows(dy), _rows(x)
        row_index, col_index = _dense(p.row_index, torch.int64), _dense(p.col_index, torch.int64)
        row_offsets, col_offsets = _dense(p.row_offsets, torch.int32), _dense(p.col_offsets, torch.int32)
        offsets = col_offsets.data_ptr()
        blocks, rank = p.num_blocks, A.shape[0]
        given = row_index.numel(), col_index.numel(), row_offsets.numel(), col_offsets.numel(), ranks.numel()
        if given != (*weight.shape, blocks + 1, blocks + 1, blocks) or not code.smoa_indices_fit(
            *weight.shape, row_index.data_ptr(), col_index.data_ptr(), row_offsets.data_ptr(), offsets, blocks
        ):
            raise _no_fit(weight, blocks)
        floats = code.smoa_gradient_workspace(
            x.shape[0], row_offsets.data_ptr(), offsets, blocks, rank, threads
        )
        workspace = x.new_empty(floats)
        with _named(GRADIENT):
            code.smoa_gradient(
                x.shape[0], *weight.shape, dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0),
                weight.data_ptr(), *weight.stride(), row_index.data_ptr(), col_index.data_ptr(),
                row_offsets.data_ptr(), offsets, blocks, ranks.data_ptr(), rank, A.data_ptr(), B.data_ptr(),
                adapter.scaling.item(), dA.data_ptr(), dB.data_ptr(), workspace.data_ptr(), threads,
            )  # fmt: skip
    dA = dA if threads == 1 else dA.sum(0)
    return (dA, dB) if adapter.A.dtype == dA.dtype else (dA.to(adapter.A.dtype), dB.to(adapter.A.dtype))


GEMMS = eager.Gemms(merged, add_base, gradient)
"""What :mod:`eager` multiplies with here."""


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
