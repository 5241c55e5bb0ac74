"""Experts in compiled code: a loop in C over experts; an expert is a layer whose tokens are its pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from ...definition.experts import ExpertsAdapter
from .. import Gradients, experts
from .backend import gradient_path, routes
from .library import KINDS, Algorithm, Call, Path, dense, unsupported_reason


def experts_forward(x: Tensor, ends: Tensor, adapter: ExpertsAdapter) -> Tensor:
    """`y_p = x_p W_effᵀ` with the W_eff of pair p's expert: x (P, C) -> y (P, N) on the CPU.

    torch computes for an expert whose ΔW is zero, so that y equals that of the model without an adapter.
    """
    weight = adapter.weight
    if not (_fits(adapter, ends) and _takes(weight, x, weight.shape[2])):
        return experts.experts_forward(x, ends, adapter)
    few, path = routes(x.dtype, adapter.A.shape[1], "auto")
    y = x.new_empty(x.shape[0], weight.shape[1])
    if _EveryExpert(ends, adapter).compute("smoa_forward", few, path, x=x, y=y):
        for e, start, end in experts.spans(ends):
            if not adapter.scaling or not adapter.B[e].any():
                experts.base_output(x[start:end], weight[e], out=y[start:end])
    return y


def experts_backward(
    dy: Tensor, x: Tensor | None, ends: Tensor, adapter: ExpertsAdapter, *, needs_x: bool
) -> Gradients:
    """Gradients (dX, dA, dB) of :func:`experts_forward`: dX where `needs_x`, dA and dB where x is given.

    dA and dB of an expert without pairs are zero.
    """
    weight, A, B = adapter.weight, adapter.A, adapter.B
    fits = _fits(adapter, ends) and _takes(weight, dy, weight.shape[1])
    if not fits or (x is not None and not (_takes(weight, x, weight.shape[2]) and x.shape[0] == dy.shape[0])):
        return experts.experts_backward(dy, x, ends, adapter, needs_x=needs_x)
    few, path = routes(dy.dtype, A.shape[1], "auto")
    dx, dA, dB, call = None, None, None, _EveryExpert(ends, adapter)
    if needs_x:
        dx = dy.new_empty(dy.shape[0], weight.shape[2])
        call.compute("smoa_input", few, path, dy=dy, y=dx)
    if x is not None:
        dA, dB = A.new_zeros(A.shape), B.new_zeros(B.shape)
        call.compute("smoa_gradient", 0, gradient_path(dy), dy=dy, x=x, dA=dA, dB=dB)
    return dx, dA, dB


class _EveryExpert(Call):
    """A call for all experts."""

    def __init__(self, ends: Tensor, adapter: ExpertsAdapter) -> None:
        blocks = adapter.blocks
        ends = dense("ends", ends, torch.int32)
        rows, cols = _index(blocks.row_index), _index(blocks.col_index)
        super().__init__(algorithm=Algorithm.MERGED, experts=ends.shape[0], ends=ends.data_ptr())
        weight, offsets = self.describe(adapter, blocks, (None, None))
        self.weight_step, self.A_step, self.B_step = map(_step, (weight, adapter.A, adapter.B))
        self.row_offsets_step, self.col_offsets_step = map(_step, offsets)
        if rows is not None and cols is not None:
            self.row_index, self.row_bytes, self.row_step = rows.data_ptr(), rows.itemsize, _step(rows)
            self.col_index, self.col_bytes, self.col_step = cols.data_ptr(), cols.itemsize, _step(cols)
        self._indices = ends, rows, cols

    def compute(self, name: str, few: int, path: Path, **tensors: Tensor) -> int:
        """:meth:`run`; experts of up to `few` pairs take :attr:`Path.FEW`, the others `path`.

        Returns:
            How many experts a forward has skipped, because their ΔW is zero.

        Raises:
            ValueError: pairs, indices or offsets of the blocks do not fit the weight or the pairs.
        """
        self.few, self.path = few, path
        skipped = self.run(name, **tensors)
        if skipped < 0:
            raise ValueError(
                "ends must count x's pairs up, and blocks must have each row and column of a weight in one block"
            )
        return skipped


def _index(index: Tensor | None) -> Tensor | None:
    if index is None:
        return None
    return dense("index", index, torch.int16 if index.dtype == torch.int16 else torch.int32)


def _step(tensor: Tensor) -> int:
    """Elements from an expert's part to the next expert's; 0 if all experts share it."""
    return tensor.stride(0) if tensor.shape[0] > 1 else 0


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
    fits = fits and weight.dtype in KINDS and weight.is_cpu and weight.numel() > 0
    return fits and unsupported_reason() is None


def _takes(weight: Tensor, given: Tensor, width: int) -> bool:
    """Whether x, or dY, has the weight's dtype and device and the right width."""
    return given.shape[1] == width and given.dtype == weight.dtype and given.is_cpu
