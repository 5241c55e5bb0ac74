"""torch multiplies, in half precision above all; compiled code does what is no GEMM (`half.h`, `gradient.h`).

torch's GEMMs take what the processor has for half types, AMX among it. Those of float32 are as fast as ours on Intel's
processors, and take over there for many tokens, but for dropout. Around them the adapter asks for copies of
activations in block order, for ΔW or W_eff, and for dA and dB of G: passes over memory, one each here, where torch's
operators take several. The algorithms are the eager backend's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...definition.packed import PackedAdapter
from ...definition.precision import accumulate
from .. import eager
from ..eager import HALF_TOKEN_PANEL
from .library import library
from .operands import KINDS, Mask, along_memory, blocks_of, dense, kept_by, labels_of, named, with_rows

__all__ = ["BLOCKS", "backward", "merged", "split"]

BLOCKS = "smoa::compiled_blocks"
"""What these compiled functions are called in a profile."""

Matrices = Tensor | Sequence[Tensor]
"""One for each block: (K, rows, columns) where they are all of one shape, else a list."""


class Side:
    """The rows of W0 block by block, or its columns: copies of activations in their order, some tokens at a time.

    Contiguous blocks are copied only where a mask drops something: else they are slices.
    """

    def __init__(self, index: Tensor, offsets: Tensor, sizes: Sequence[int], contiguous: bool) -> None:
        self._index, self._offsets, self._sizes, self._contiguous = index, offsets, sizes, contiguous
        self._threads = torch.get_num_threads()
        self._memory: Tensor | None = None
        self._workspace: Tensor | None = None

    def ordered(self, x: Tensor, mask: Mask | None) -> Matrices:
        """The blocks' columns of x (T, all), without what the mask drops; the next call overwrites them."""
        found = self.room(x, mask)
        self._copy(x, mask, back=False)
        return found

    def room(self, x: Tensor, mask: Mask | None) -> Matrices:
        """Where the blocks' columns of x are written, for :meth:`restore`."""
        if self._contiguous and mask is None:
            return torch.split_with_sizes(x, self._sizes, 1)
        if self._memory is None:  # the first panel is the largest
            self._memory = x.new_empty(x.shape)
            floats = library().smoa_order_workspace(x.shape[1], self._threads)
            self._workspace = x.new_empty(floats, dtype=torch.float32)
        return matrices(self._memory, [(x.shape[0], size) for size in self._sizes])

    def restore(self, x: Tensor, mask: Mask | None) -> None:
        """Write to x (T, all) what is in its :meth:`room`, without what the mask drops."""
        self._copy(x, mask, back=True)

    def _copy(self, x: Tensor, mask: Mask | None, *, back: bool) -> None:
        if self._memory is None or self._workspace is None or (self._contiguous and mask is None):
            return
        with named(BLOCKS):
            library().smoa_order(
                x.shape[0], x.data_ptr(), x.stride(0), KINDS[x.dtype], self._index.data_ptr(),
                self._offsets.data_ptr(), len(self._sizes), kept_by(mask), self._memory.data_ptr(), back,
                self._workspace.data_ptr(), self._threads,
            )  # fmt: skip


class Blocks:
    """An adapter's blocks, and what is computed of them.

    Compiled code reads W0 along its memory: of a column-major W0 it gets the transpose, and makes transposes.

    Attributes:
        adapter: that of W0, or of its transpose where `swapped`.
        rows: W0's rows by block.
        cols: its columns.
        shapes: of each block of the adapter's weight.
        used: whether each block has a rank.
    """

    def __init__(self, adapter: PackedAdapter) -> None:
        self.swapped = adapter.weight.stride(1) != 1
        self.adapter = along = adapter.T if self.swapped else adapter
        p = along.partition
        *index, self.ranks = blocks_of(along)
        self.indices = [one.data_ptr() for one in index]
        self.rows, self.cols = (
            Side(index[i], index[i + 2], sizes, p.is_contiguous)
            for i, sizes in enumerate((p.row_sizes, p.col_sizes))
        )
        if self.swapped:
            self.rows, self.cols = self.cols, self.rows
        self.shapes = list(zip(p.row_sizes, p.col_sizes, strict=True))
        self.count, self.contiguous, self.scaling = p.num_blocks, p.is_contiguous, adapter.scaling.item()
        self.used = adapter.host_ranks()

    def memory(self) -> Tensor:
        """Room for a matrix of each block's shape."""
        return self.adapter.weight.new_empty(sum(rows * cols for rows, cols in self.shapes))

    def deltas(self, scale: float) -> Matrices:
        """`scale · ΔW_k` (N_k, C_k) in W0's dtype."""
        weight, A, B = self.adapter.weight, self.adapter.A, self.adapter.B
        out, rank, code, threads = self.memory(), A.shape[0], library(), torch.get_num_threads()
        floats = code.smoa_change_workspace(max(cols for _, cols in self.shapes), rank, threads)
        workspace = out.new_empty(floats, dtype=torch.float32)
        with named(BLOCKS):
            code.smoa_deltas(
                weight.data_ptr(), weight.stride(0), KINDS[weight.dtype], *self.indices, self.count, self.contiguous,
                self.ranks.data_ptr(), rank, A.data_ptr(), *A.stride(), B.data_ptr(), *B.stride(), KINDS[A.dtype],
                scale * self.scaling, out.data_ptr(), workspace.data_ptr(), threads,
            )  # fmt: skip
        found = matrices(out, self.shapes)
        return transposed(found) if self.swapped else found

    def panels(self, mask: Mask | None, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
        """The same tokens of the mask and of each tensor, some at a time; None of what is None."""
        tokens = next(len(one) for one in tensors if one is not None)
        # Where nothing is copied there is nothing to keep in a cache; and a small layer feels each call.
        if tokens <= HALF_TOKEN_PANEL or (self.contiguous and mask is None):
            yield (mask, *tensors)
            return
        for first in range(0, tokens, HALF_TOKEN_PANEL):
            some = slice(first, first + HALF_TOKEN_PANEL)
            kept = None if mask is None else Mask(mask.kept[some], mask.scale)
            yield (kept, *(None if one is None else one[some] for one in tensors))

    def product(self, left: Matrices, right: Matrices, out: Matrices, *, add: bool = False) -> None:
        """Write `left_k right_k` to `out_k`, or add it; zeros where a block has no rank."""
        if (
            isinstance(left, Tensor)
            and isinstance(right, Tensor)
            and isinstance(out, Tensor)
            and all(self.used)
        ):
            _ = out.baddbmm_(left, right) if add else torch.bmm(left, right, out=out)
            return
        # Slices too: a batched GEMM copies them first, or with a transpose takes more than twice as long.
        for left_k, right_k, out_k, used in zip(left, right, out, self.used, strict=True):
            if not used:
                out_k.zero_()
            elif add:
                out_k.addmm_(left_k, right_k)
            else:
                torch.mm(left_k, right_k, out=out_k)


class Gradient:
    """dA and dB, summed over panels of tokens: of each, G_k is multiplied and, in half precision, contracted at once.

    In float32 G_k is itself the sum, so that W0 is read but once.
    """

    def __init__(self, blocks: Blocks, scale: float) -> None:
        self._blocks, self._threads = blocks, torch.get_num_threads()
        self._scaling = scale * blocks.scaling
        self._A, self._B = blocks.adapter.A.contiguous(), blocks.adapter.B.contiguous()
        shape = self._A.shape if self._threads == 1 else (self._threads, *self._A.shape)
        self._dA = self._A.new_zeros(shape, dtype=torch.float32)
        self._dB = self._B.new_zeros(self._B.shape, dtype=torch.float32)
        self._memory = blocks.memory()
        size = library().smoa_contract_workspace(
            *blocks.indices[2:], blocks.count, self._A.shape[0], self._threads
        )
        self._workspace = self._dA.new_empty(size)
        self._sums, self._begun = self._memory.dtype == torch.float32, False

    def add(self, dy: Matrices, x: Matrices) -> None:
        """Take some tokens of both, in block order."""
        blocks, add = self._blocks, self._begun and self._sums
        left, right = (x, dy) if blocks.swapped else (dy, x)
        blocks.product(transposed(left), right, matrices(self._memory, blocks.shapes), add=add)
        self._begun = True
        if not self._sums:
            self._contract()

    def _contract(self) -> None:
        blocks, weight = self._blocks, self._blocks.adapter.weight
        with named(BLOCKS):
            library().smoa_contract(
                *weight.shape, self._memory.data_ptr(), weight.data_ptr(), weight.stride(0), KINDS[weight.dtype],
                *blocks.indices, blocks.count, blocks.contiguous, blocks.ranks.data_ptr(), self._A.shape[0],
                self._A.data_ptr(), self._B.data_ptr(), KINDS[self._A.dtype], self._scaling, self._dA.data_ptr(),
                self._dB.data_ptr(), self._workspace.data_ptr(), self._threads,
            )  # fmt: skip

    def found(self) -> tuple[Tensor, Tensor]:
        """(dA, dB) in the factors' dtype."""
        if self._sums:
            self._contract()
        dA = self._dA if self._threads == 1 else self._dA.sum(0)
        dA, dB = (self._dB.T, dA.T) if self._blocks.swapped else (dA, self._dB)
        return dense(dA, self._A.dtype), dense(dB, self._A.dtype)


def matrices(memory: Tensor, shapes: Sequence[tuple[int, int]]) -> Matrices:
    """The matrices of these shapes that lie one after another in `memory`, which may have room for more."""
    rows, cols = shapes[0]
    if shapes.count((rows, cols)) == len(shapes):
        return memory.as_strided((len(shapes), rows, cols), (rows * cols, cols, 1))
    sizes = [rows * cols for rows, cols in shapes]
    parts = memory.view(-1)[: sum(sizes)].split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def transposed(each: Matrices) -> Matrices:
    """The transpose of each."""
    return each.mT if isinstance(each, Tensor) else [one.T for one in each]


def split(x: Tensor, adapter: PackedAdapter, mask: Mask | None) -> Tensor:
    """`x W0ᵀ + dropout(x) ΔWᵀ` (T, N): the adapter's output first, the base GEMM adds to it and rounds once."""
    adapter, x = _readable(adapter), with_rows(x)
    blocks = Blocks(adapter)
    deltas = transposed(blocks.deltas(1.0 if mask is None else mask.scale))
    y = x.new_empty(x.shape[0], adapter.weight.shape[0])
    for kept, x_part, y_part in blocks.panels(mask, x, y):
        blocks.product(blocks.cols.ordered(x_part, kept), deltas, blocks.rows.room(y_part, None))
        blocks.rows.restore(y_part, None)
    return accumulate(y, x, adapter.weight)


def merged(x: Tensor, adapter: PackedAdapter) -> Tensor:
    """`x W_effᵀ` (T, N), W_eff rounded once."""
    adapter = _readable(adapter)
    return eager.merged_product(x, adapter.weight, _modulation(adapter))


def backward(
    dy: Tensor, x: Tensor | None, adapter: PackedAdapter, mask: Mask | None, *, needs_x: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dX, dA, dB), those that are asked for; with a mask in one walk over the tokens, but for dY W0 in dX."""
    adapter, dy = _readable(adapter), with_rows(dy)
    dx = dA = dB = None
    if x is not None or (mask is not None and needs_x):
        blocks, scale = Blocks(adapter), 1.0 if mask is None else mask.scale
        gradient = deltas = None
        if x is not None:
            x, gradient = with_rows(x), Gradient(blocks, scale)
        if mask is not None and needs_x:
            dx, deltas = dy.new_empty(dy.shape[0], adapter.weight.shape[1]), blocks.deltas(scale)
        for kept, dy_part, x_part, dx_part in blocks.panels(mask, dy, x, dx):
            dy_k = blocks.rows.ordered(dy_part, None)
            if deltas is not None:
                blocks.product(dy_k, deltas, blocks.cols.room(dx_part, kept))
                blocks.cols.restore(dx_part, kept)
            if gradient is not None:
                gradient.add(dy_k, blocks.cols.ordered(x_part, kept))
        if gradient is not None:
            dA, dB = gradient.found()
        del blocks, gradient, dy_k  # dX needs memory of its own
    if needs_x and dx is None:
        dx = eager.input_gradient(dy, adapter, _modulation(adapter, transposed=True))
    elif dx is not None:
        dx.addmm_(dy, adapter.weight)
    return dx, dA, dB


def _modulation(adapter: PackedAdapter, *, transposed: bool = False) -> eager.Modulation:
    """As the eager backend's: writes rows of W_eff, or of its transpose, the first of which it is told."""
    swapped = adapter.weight.stride(1) != 1
    along = adapter.T if swapped else adapter
    row_block, col_block, wide = labels_of(along)
    weight, A, B = along.weight, along.A, along.B
    ranks, rank, scaling = dense(adapter.ranks, torch.int32), A.shape[0], adapter.scaling.item()
    code, threads = library(), torch.get_num_threads()
    floats = code.smoa_change_workspace(weight.shape[1], rank, threads)
    workspace = A.new_empty(floats, dtype=torch.float32)

    def write(first: int, out: Tensor) -> Tensor:
        to, row, col = (out, first, 0) if swapped == transposed else (out.T, 0, first)
        with named(BLOCKS):
            code.smoa_modulate(
                *to.shape, _address(weight, row, col), weight.stride(0), KINDS[weight.dtype], _address(row_block, row),
                _address(col_block, col), wide, len(ranks), ranks.data_ptr(), rank, _address(A, 0, col), *A.stride(),
                _address(B, row, 0), *B.stride(), KINDS[A.dtype], scaling, to.data_ptr(), to.stride(0),
                workspace.data_ptr(), threads,
            )  # fmt: skip
        return out

    return write


def _address(tensor: Tensor, *at: int) -> int:
    """Of an element: a view of it would cost a small layer more."""
    steps = sum(i * stride for i, stride in zip(at, tensor.stride(), strict=True))
    return tensor.data_ptr() + steps * tensor.itemsize


def _readable(adapter: PackedAdapter) -> PackedAdapter:
    """The adapter with a W0 that has contiguous rows or columns."""
    weight = along_memory(adapter.weight)
    return adapter if weight is adapter.weight else replace(adapter, weight=weight)
