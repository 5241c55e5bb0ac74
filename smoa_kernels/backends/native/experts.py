"""Experts in compiled code: a loop in C over experts, each of which is a layer whose tokens are its pairs."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...definition.experts import ExpertsAdapter
from .. import Gradients, experts
from .backend import Path, gradient_path, route
from .library import KINDS, Algorithm, Call, dense, obstacle


def experts_forward(x: Tensor, ends: Tensor, adapter: ExpertsAdapter) -> Tensor:
    """`y_p = x_p W_effᵀ` with the W_eff of pair p's expert: x (P, C) -> y (P, N) on the CPU.

    torch computes for an expert whose ΔW is zero, so that y equals that of the model without an adapter.
    """
    weight = adapter.weight
    fits = _fits(adapter, ends) and _takes(weight, x, weight.shape[2])
    every = _EveryExpert(ends, adapter) if fits else None
    if every is None or not every.choose_paths(x, transposed=False):
        return experts.experts_forward(x, ends, adapter)
    y = x.new_empty(x.shape[0], weight.shape[1])
    for e, start, end in every.spans:
        if not adapter.scaling or not adapter.B[e].any():
            every.paths[e] = Path.EAGER
            experts.base_output(x[start:end], weight[e], out=y[start:end])
    every.call.run("smoa_forward", x=x, y=y)
    return y


def experts_backward(
    dy: Tensor, x: Tensor | None, ends: Tensor, adapter: ExpertsAdapter, *, needs_x: bool
) -> Gradients:
    """Gradients (dX, dA, dB) of :func:`experts_forward`: dX where `needs_x`, dA and dB where x is given.

    dA and dB of an expert without pairs are zero.
    """
    weight, A, B = adapter.weight, adapter.A, adapter.B
    fits = _fits(adapter, ends) and _takes(weight, dy, weight.shape[1])
    fits = fits and (x is None or (_takes(weight, x, weight.shape[2]) and x.shape[0] == dy.shape[0]))
    every = _EveryExpert(ends, adapter) if fits else None
    if every is None or not every.choose_paths(dy, transposed=True):
        return experts.experts_backward(dy, x, ends, adapter, needs_x=needs_x)
    dx, dA, dB = None, None, None
    if needs_x:
        dx = dy.new_empty(dy.shape[0], weight.shape[2])
        every.call.run("smoa_input", dy=dy, y=dx)
    if x is not None:
        dA, dB = A.new_zeros(A.shape), B.new_zeros(B.shape)
        every.paths[:] = [gradient_path(dy, weight[0], A.shape[1])] * weight.shape[0]
        every.call.run("smoa_gradient", dy=dy, x=x, dA=dA, dB=dB)
    return dx, dA, dB


class _EveryExpert:
    """A call for all experts.

    Attributes:
        call: the arguments of the compiled functions.
        spans: each expert that has pairs: its number, its first pair and where its pairs end.
        paths: of each expert.

    Raises:
        ValueError: pairs, indices or offsets of the blocks do not fit the weight or the pairs.
    """

    def __init__(self, ends: Tensor, adapter: ExpertsAdapter) -> None:
        A, B, blocks, count = adapter.A, adapter.B, adapter.blocks, adapter.weight.shape[0]
        last = ends.tolist()
        if last != sorted(last) or last[0] < 0:
            raise ValueError(_MISFIT)
        self.spans, self.paths = experts.spans(ends), (ctypes.c_int64 * count)()
        ends = dense(ends, torch.int32)
        index = [
            dense(one, torch.int16 if one.dtype == torch.int16 else torch.int32)
            for one in (blocks.row_index, blocks.col_index)
            if one is not None
        ]
        self._kept = ends, index
        self.call = call = Call(algorithm=Algorithm.MERGED, experts=count, ends=ends.data_ptr())
        weight, offsets = call.describe(adapter, blocks, (None, None))
        self._weight, self._rank, self._pairs = weight[0], A.shape[1], last[-1]
        call.weight_step, call.A_step, call.B_step = (one.stride(0) for one in (weight, A, B))
        call.row_offsets_step, call.col_offsets_step = map(_step, offsets)
        for side, one in zip(("row", "col"), index, strict=False):
            for field, value in (("index", one.data_ptr()), ("bytes", one.itemsize), ("step", _step(one))):
                setattr(call, f"{side}_{field}", value)
        call.paths = ctypes.addressof(self.paths)
        if call.misfits(weight[0]):
            raise ValueError(_MISFIT)

    def choose_paths(self, given: Tensor, *, transposed: bool) -> bool:
        """Set each expert's path for x, or if `transposed` for dX; returns whether compiled code takes all."""
        if self._pairs != given.shape[0]:
            raise ValueError(_MISFIT)
        path: dict[int, Path] = {}
        for e, start, end in self.spans:
            count = end - start
            if count not in path:
                path[count] = route(given[:count], self._weight, self._rank, "auto", transposed=transposed)
            self.paths[e] = path[count]
        return Path.EAGER not in path.values()


_MISFIT = "ends must count x's pairs up, and blocks must have each row and column of a weight in one block"


def _step(one: Tensor) -> int:
    """Elements from one expert's part to the next one's; 0 if all share one."""
    return one.stride(0) if one.shape[0] > 1 else 0


def _fits(adapter: ExpertsAdapter, ends: Tensor) -> bool:
    """Whether compiled code can run. If shapes disagree it may not: it would read beyond an operand's end."""
    weight, blocks = adapter.weight, adapter.blocks
    (count, rows, cols), rank = weight.shape, adapter.A.shape[1]
    fits = adapter.A.shape == (count, rank, cols) and adapter.B.shape == (count, rows, rank)
    fits = fits and adapter.A.dtype in KINDS and adapter.A.dtype == adapter.B.dtype
    fits = fits and ends.shape == (count,) and adapter.ranks.shape == (blocks.num_blocks,)
    for offsets, index, size in (
        (blocks.row_offsets, blocks.row_index, rows),
        (blocks.col_offsets, blocks.col_index, cols),
    ):
        fits = fits and offsets.shape[0] in (1, count) and offsets.shape[1] == blocks.num_blocks + 1
        fits = fits and (index is None or (index.shape[0] in (1, count) and index.shape[1] == size))
    return fits and weight.dtype in KINDS and weight.is_cpu and weight.numel() > 0 and obstacle() is None


def _takes(weight: Tensor, given: Tensor, width: int) -> bool:
    """Whether x, or dY, has the weight's dtype and device and the right width."""
    return given.shape[1] == width and given.dtype == weight.dtype and given.is_cpu
