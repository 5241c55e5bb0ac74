"""Experts in compiled code: the pairs (token, expert) of each expert are one call of a layer, in every dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...definition.experts import ExpertsAdapter
from .. import Gradients, eager, experts
from .backend import Path, route
from .library import KINDS, Algorithm, Call, Layer, along_memory, dense, obstacle

__all__ = ["experts_backward", "experts_product"]


def experts_product(ends: Tensor, adapter: ExpertsAdapter) -> Callable[[Tensor], Tensor]:
    """Return a function `y_p = x_p W_effᵀ` with the W_eff of pair p's expert: x (P, C) -> y (P, N) on the CPU.

    If B is zero, torch computes the base's part, so that y equals that of the model without an adapter. In float32
    torch computes it for all but few pairs, and the adapter's part is added.
    """
    weight, plain = adapter.weight, experts.experts_product(ends, adapter)
    if not _fits(adapter, ends):
        return plain
    calls = _Calls(ends, adapter)

    def product(x: Tensor) -> Tensor:
        if not _takes(weight, x, weight.shape[2]):
            return plain(x)
        y = x.new_empty(calls.check_pairs(x), weight.shape[1])
        for e, pairs in calls.spans:
            updates, call, path = calls.turn_to(e), calls.call, calls.route(x[pairs], "auto")
            added = x.dtype == torch.float32 and path != Path.FEW
            if added or not updates:
                experts.base_output(x[pairs], weight[e], out=y[pairs])
            if updates and path == Path.EAGER:
                y[pairs] = eager.forward(x[pairs], None, adapter.experts([e])[0], "auto", None)
            elif updates:
                call.plan(path, Algorithm.UPDATE if added else Algorithm.MERGED)
                call.run("smoa_forward", x=x[pairs], y=y[pairs])
        return y

    return product


def experts_backward(
    dy: Tensor, x: Tensor | None, ends: Tensor, adapter: ExpertsAdapter, *, needs_x: bool
) -> Gradients:
    """Gradients (dX, dA, dB) of :func:`experts_product`: dX where `needs_x`, dA and dB where x is given.

    dA and dB of an expert without pairs are zero.
    """
    weight = adapter.weight
    fits = _fits(adapter, ends) and _takes(weight, dy, weight.shape[1])
    fits = fits and (x is None or (_takes(weight, x, weight.shape[2]) and len(x) == len(dy)))
    if not fits:
        return experts.experts_backward(dy, x, ends, adapter, needs_x=needs_x)
    calls = _Calls(ends, adapter)
    dx = dy.new_empty(calls.check_pairs(dy), weight.shape[2]) if needs_x else None
    dA, dB = (
        (None, None) if x is None else (torch.zeros_like(one.contiguous()) for one in (adapter.A, adapter.B))
    )
    for e, pairs in calls.spans:
        path = calls.route(dy[pairs], "auto", transposed=True)
        if path == Path.EAGER:
            given, layer = None if x is None else x[pairs], adapter.experts([e])[0]
            dx_e, dA_e, dB_e = eager.backward(dy[pairs], given, layer, None, needs_x=needs_x)
            if dx is not None and dx_e is not None:
                dx[pairs] = dx_e
            if dA is not None and dA_e is not None and dB is not None and dB_e is not None:
                dA[e], dB[e] = dA_e, dB_e
            continue
        calls.turn_to(e)
        if dx is not None:
            calls.call.plan(path, Algorithm.MERGED).run("smoa_input", dy=dy[pairs], y=dx[pairs])
        if x is not None and dA is not None and dB is not None:
            tiles = calls.route(dy[pairs], "dropout") == Path.TILES
            calls.call.plan(Path.TILES if tiles else Path.FLOAT, Algorithm.SPLIT)
            calls.call.run("smoa_gradient", dy=dy[pairs], x=x[pairs], dA=dA[e], dB=dB[e])
    return dx, dA, dB


class _Calls:
    """One call that is pointed at one expert after another.

    Attributes:
        call: the arguments of the compiled functions.
        spans: each expert that has pairs, with its pairs.
    """

    def __init__(self, ends: Tensor, adapter: ExpertsAdapter) -> None:
        blocks, weight, (A, B) = adapter.blocks, adapter.weight, (adapter.A, adapter.B)
        weight, ranks, (_, rows, cols) = along_memory(weight), dense(adapter.ranks, torch.int32), weight.shape
        sides = [
            torch.arange(size)[None] if index is None else dense(index, torch.int64)
            for size, index in ((rows, blocks.row_index), (cols, blocks.col_index))
        ] + [dense(offsets, torch.int32) for offsets in (blocks.row_offsets, blocks.col_offsets)]
        self._operands = weight, A, B, ranks, sides
        self.spans = [(e, slice(start, end)) for e, start, end in experts.spans(ends)]
        last = ends.tolist()
        self._pairs = (last or [0])[-1] if last == sorted(last) else -1
        self.call = Call()
        self.call.layer = Layer(
            rows, cols, KINDS[weight.dtype], *weight.stride()[1:], None,
            A.shape[1], KINDS[A.dtype], *A.stride()[1:], *B.stride()[1:], None, None,
            blocks.num_blocks, blocks.is_contiguous, ranks.data_ptr(), None, None, None, None,
            adapter.scaling.item(),
        )  # fmt: skip

    def check_pairs(self, given: Tensor) -> int:
        """Return the number of pairs; checks that all are given."""
        if self._pairs != len(given):
            raise ValueError(_MISFIT)
        return self._pairs

    def route(self, given: Tensor, algorithm: str, *, transposed: bool = False) -> Path:
        """The path for some pairs of one expert."""
        weight, A, *_ = self._operands
        return route(given, weight[0], A.shape[1], algorithm, transposed=transposed)

    def turn_to(self, e: int) -> bool:
        """Point the call at an expert; returns whether its ΔW may be nonzero.

        Raises:
            ValueError: its blocks do not fit the weight.
        """
        weight, A, B, _, sides = self._operands
        layer = self.call.layer
        layer.weight, layer.A, layer.B = (each[e].data_ptr() for each in (weight, A, B))
        layer.row_index, layer.col_index, layer.row_offsets, layer.col_offsets = (
            side[e % len(side)].data_ptr() for side in sides
        )
        return self.call.check(_MISFIT, weight[e])


_MISFIT = "ends must count x's pairs up, and blocks must have each row and column of a weight in one block"


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
        fits = fits and len(offsets) in (1, count) and offsets.shape[1] == blocks.num_blocks + 1
        fits = fits and (index is None or (len(index) in (1, count) and index.shape[1] == size))
    return fits and weight.dtype in KINDS and weight.is_cpu and weight.numel() > 0 and obstacle() is None


def _takes(weight: Tensor, given: Tensor, width: int) -> bool:
    """Whether x, or dY, has the weight's dtype and device and the right width."""
    return given.shape[1] == width and given.dtype == weight.dtype and given.is_cpu
