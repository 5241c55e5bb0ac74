"""Experts in compiled code: in float32 by `experts.h`, in half precision a layer each (`backend.py`)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from ...definition.experts import ExpertsAdapter
from .. import Gradients, eager, experts
from ..pages import workspace
from . import backend
from .layer import integers, pointers
from .library import library, obstacle
from .operands import KINDS, dense, named, with_rows

__all__ = ["experts_backward", "experts_product"]

_LINEAR, _UPDATE, _GRADIENT = range(3)
"""What a workspace is for, as `experts.h` numbers it."""


class _Side(ctypes.Structure):
    _fields_ = [
        *integers("count"),
        *pointers("index"),
        *integers("wide index_step"),
        *pointers("offsets"),
        *integers("offsets_step"),
    ]


class _Experts(ctypes.Structure):
    _fields_ = [
        *integers("count blocks rank"),
        *pointers("ends ranks"),
        ("rows", _Side),
        ("cols", _Side),
        *pointers("weight"),
        *integers("weight_expert weight_row weight_col"),
        *pointers("A"),
        *integers("A_expert A_rank A_col"),
        *pointers("B"),
        *integers("B_expert B_row B_rank"),
        ("scaling", ctypes.c_double),
    ]


def experts_product(ends: Tensor, adapter: ExpertsAdapter) -> Callable[[Tensor], Tensor]:
    """What computes `y_p = x_p W_effᵀ` with the W_eff of pair p's expert: x (P, C) -> y (P, N) on the CPU.

    W0 of an expert that few pairs meet is read once, and W_eff multiplies. Of others, and where B is zero, the base's
    part is torch's own product, so that with a B of zero y is what the model without an adapter computes; the
    adapter's part follows while W0 is in the cache.
    """
    weight, fits = adapter.weight, _fits(adapter, ends)

    def layer_by_layer(x: Tensor) -> Tensor:
        takes = fits and _takes(weight, x, weight.shape[2])
        return experts.experts_product(ends, adapter, backend if takes else eager)(x)

    if not fits or weight.dtype != torch.float32:
        return layer_by_layer
    code, threads, call, spans = library(), torch.get_num_threads(), _Call(ends, adapter), experts.spans(ends)
    pairs = spans[-1][2] if spans else 0
    floats = call.workspace(_UPDATE, pairs, threads)

    def product(x: Tensor) -> Tensor:
        call.check(x.shape[0] == pairs)
        if not _takes(weight, x, weight.shape[2]):
            return layer_by_layer(x)
        x, y, room = with_rows(x), x.new_empty(pairs, weight.shape[1]), workspace(x, floats)
        operands = x.data_ptr(), x.stride(0), y.data_ptr(), room.data_ptr(), threads
        with named("smoa::compiled_experts"):
            for e, start, end in spans:
                written = code.smoa_experts_few_fit(call.address, e, start, end, *operands)
                call.check(written >= 0)
                if not written:
                    experts.base_output(x[start:end], weight[e], out=y[start:end])
                    call.check(code.smoa_experts_update_fit(call.address, e, start, end, *operands))
        return y

    return product


def experts_backward(
    dy: Tensor, x: Tensor | None, ends: Tensor, adapter: ExpertsAdapter, *, needs_x: bool
) -> Gradients:
    """Gradients (dX, dA, dB) of :func:`experts_product`: dX where `needs_x`, dA and dB where x is given."""
    weight = adapter.weight
    fits = _fits(adapter, ends) and _takes(weight, dy, weight.shape[1])
    fits = fits and (x is None or (_takes(weight, x, weight.shape[2]) and len(x) == len(dy)))
    if not fits or dy.dtype != torch.float32:
        return experts.experts_backward(dy, x, ends, adapter, backend if fits else eager, needs_x=needs_x)
    dA, dB = (None, None) if x is None else factor_gradients(dy, x, ends, adapter)
    return input_gradient(dy, ends, adapter) if needs_x else None, dA, dB


def input_gradient(dy: Tensor, ends: Tensor, adapter: ExpertsAdapter) -> Tensor:
    """`dX = dY W_eff` (P, C), all experts in one call."""
    dx = dy.new_empty(dy.shape[0], adapter.weight.shape[2])
    if dy.numel():
        dy, threads, call = with_rows(dy), torch.get_num_threads(), _Call(ends, adapter.T)
        room = workspace(dy, call.workspace(_LINEAR, len(dy), threads))
        with named("smoa::compiled_experts"):
            fits = library().smoa_experts_linear_fit(
                call.address, dy.data_ptr(), dy.stride(0), dx.data_ptr(), room.data_ptr(), threads
            )
        call.check(fits)
    return dx


def factor_gradients(dy: Tensor, x: Tensor, ends: Tensor, adapter: ExpertsAdapter) -> tuple[Tensor, Tensor]:
    """(dA, dB), as a layer's, expert by expert; zeros for experts without pairs."""
    dtype, (A, B) = adapter.A.dtype, (dense(factor, torch.float32) for factor in (adapter.A, adapter.B))
    dA, dB = torch.zeros_like(A), torch.zeros_like(B)
    if x.numel() and dy.numel():
        dy, x, threads = with_rows(dy), with_rows(x), torch.get_num_threads()
        call = _Call(
            ends, ExpertsAdapter(adapter.weight, A, B, adapter.blocks, adapter.ranks, adapter.scaling)
        )
        room = workspace(x, call.workspace(_GRADIENT, len(x), threads))
        with named("smoa::compiled_experts_gradient"):
            fits = library().smoa_experts_gradient_fit(
                call.address, dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0), dA.data_ptr(), dB.data_ptr(),
                room.data_ptr(), threads,
            )  # fmt: skip
        call.check(fits)
    return dA.to(dtype), dB.to(dtype)


class _Call:
    """What the compiled functions are told of the experts, and the tensors that it points to."""

    def __init__(self, ends: Tensor, adapter: ExpertsAdapter) -> None:
        blocks, (count, rows, cols) = adapter.blocks, adapter.weight.shape
        # The compiled code walks along one side of a weight.
        weight = adapter.weight if 1 in adapter.weight.stride()[1:] else adapter.weight.contiguous()
        A, B = adapter.A.to(torch.float32), adapter.B.to(torch.float32)
        ends, ranks = dense(ends, torch.int32), dense(adapter.ranks, torch.int32)
        sides = [
            (size, None if index is None else index.contiguous(), dense(offsets, torch.int32))
            for size, index, offsets in (
                (rows, blocks.row_index, blocks.row_offsets),
                (cols, blocks.col_index, blocks.col_offsets),
            )
        ]
        self._kept = weight, A, B, ends, ranks, sides
        self._experts = _Experts(
            count, blocks.num_blocks, A.shape[1], ends.data_ptr(), ranks.data_ptr(),
            *(_side(size, index, offsets) for size, index, offsets in sides),
            weight.data_ptr(), *weight.stride(), A.data_ptr(), *A.stride(), B.data_ptr(), *B.stride(),
            adapter.scaling.item(),
        )  # fmt: skip
        self.address = ctypes.addressof(self._experts)

    def workspace(self, stage: int, pairs: int, threads: int) -> int:
        """How many floats the compiled functions of a stage need."""
        floats: int = library().smoa_experts_workspace(self.address, stage, pairs, threads)
        self.check(floats >= 0)
        return floats

    def check(self, fits: bool | int) -> None:
        """Raise where the compiled code found blocks that do not fit the weight, or ends that do not fit x."""
        if not fits:
            raise ValueError(
                "ends must count x's pairs up, and blocks must have each row and column of a weight in one block"
            )


def _side(size: int, index: Tensor | None, offsets: Tensor) -> _Side:
    step = offsets.stride(0) if len(offsets) > 1 else 0
    if index is None:
        return _Side(size, None, 0, 0, offsets.data_ptr(), step)
    wide, index_step = int(index.dtype == torch.int32), size if len(index) > 1 else 0
    return _Side(size, index.data_ptr(), wide, index_step, offsets.data_ptr(), step)


def _fits(adapter: ExpertsAdapter, ends: Tensor) -> bool:
    """Whether compiled code can run, of operands whose shapes agree: it would follow others beyond their end."""
    weight, blocks = adapter.weight, adapter.blocks
    (count, rows, cols), rank = weight.shape, adapter.A.shape[1]
    fits = adapter.A.shape == (count, rank, cols) and adapter.B.shape == (count, rows, rank)
    fits = fits and adapter.A.dtype in KINDS and adapter.A.dtype == adapter.B.dtype
    fits = fits and ends.shape == (count,) and adapter.ranks.shape == (blocks.num_blocks,)
    for offsets, index, size in (
        (blocks.row_offsets, blocks.row_index, rows),
        (blocks.col_offsets, blocks.col_index, cols),
    ):
        fits = fits and len(offsets) in (1, count) and offsets.shape[1] == blocks.num_blocks + 1
        if index is not None:
            known = index.dtype in (torch.int16, torch.int32)
            fits = fits and known and len(index) in (1, count) and index.shape[1] == size
    return fits and weight.dtype in KINDS and weight.is_cpu and obstacle() is None


def _takes(weight: Tensor, given: Tensor, width: int) -> bool:
    """Whether what is multiplied by the weight, or its gradient, is of its kind and as wide."""
    return given.shape[1] == width and given.dtype == weight.dtype and given.is_cpu
