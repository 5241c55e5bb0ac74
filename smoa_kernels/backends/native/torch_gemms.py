"""torch multiplies, in half precision above all; compiled code does what is no GEMM (`passes.h`, `gradient.h`).

torch's GEMMs take what the processor has for half types; bfloat16 is `bf16.py`'s where that can run. Those of
float32 are as fast as ours on Intel's processors with AVX-512 and no AMX, and take over there for many tokens, but for
dropout. Around them the adapter asks for copies of activations in block order, for ΔW or W_eff, and for dA and dB of G:
passes over memory, one each here, where torch's operators take several. The algorithms are the eager backend's.

GEMMs drive Python's and torch's own code out of the processor's caches. Between them each kind of operator therefore
costs several times what it costs in a loop: what could be one more, such as a conversion, is done in C.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...definition.packed import PackedAdapter
from ...definition.precision import accumulate
from .. import eager
from ..eager import HALF_TOKEN_PANEL
from ..pages import in_large_pages
from .layer import Layer
from .library import library
from .operands import KINDS, Mask, along_memory, kept_by, named, with_rows

__all__ = ["BLOCKS", "backward", "merged", "split"]

BLOCKS = "smoa::compiled_blocks"
"""What these compiled functions are called in a profile."""

Matrices = Tensor | Sequence[Tensor]
"""One for each block: (K, rows, columns) where they are one batch, else a list."""


class Side:
    """The rows of W0 block by block, or its columns: copies of activations in their order, some tokens at a time.

    Contiguous blocks are slices. They are copied where a mask drops something, or to be the operand of one batch.
    """

    def __init__(
        self, index: Tensor, offsets: Tensor, sizes: Sequence[int], *, contiguous: bool, batched: bool
    ) -> None:
        self._index, self._offsets, self._sizes = index, offsets, sizes
        self._contiguous, self._batched = contiguous, batched
        self._memory: Tensor | None = None

    def ordered(self, x: Tensor, mask: Mask | None) -> Matrices:
        """The blocks' columns of x (T, all), without what the mask drops; the next call overwrites them."""
        if self._lie(mask) and not self._batched:
            return slices(x, self._sizes, batched=False)
        found = self._copies(x)
        self._copy(x, mask, back=False)
        return found

    def room(self, x: Tensor, mask: Mask | None) -> Matrices:
        """Where the blocks' columns of x are written, for :meth:`restore`."""
        return slices(x, self._sizes, self._batched) if self._lie(mask) else self._copies(x)

    def restore(self, x: Tensor, mask: Mask | None) -> None:
        """Write to x (T, all) what is in its :meth:`room`, without what the mask drops."""
        if not self._lie(mask):
            self._copy(x, mask, back=True)

    def _lie(self, mask: Mask | None) -> bool:
        """Whether the blocks' columns lie side by side, and none is dropped."""
        return self._contiguous and mask is None

    def _copies(self, x: Tensor) -> Matrices:
        if self._memory is None:  # the first panel is the largest
            self._memory = x.new_empty(x.shape)
        tokens = x.shape[0]
        return matrices(self._memory, [(tokens, size) for size in self._sizes], self._batched)

    def _copy(self, x: Tensor, mask: Mask | None, *, back: bool) -> None:
        if self._memory is None:
            return
        code, threads, index, workspace = library(), torch.get_num_threads(), None, None
        if not self._lie(mask):
            workspace = x.new_empty(code.smoa_order_workspace(x.shape[1], threads), dtype=torch.float32)
            index = self._index.data_ptr()
        with named(BLOCKS):
            code.smoa_order(
                x.shape[0], x.data_ptr(), x.stride(0), KINDS[x.dtype], index, self._offsets.data_ptr(),
                len(self._sizes), kept_by(mask), self._memory.data_ptr(), back,
                None if workspace is None else workspace.data_ptr(), threads,
            )  # fmt: skip


class Blocks:
    """An adapter's blocks, and what is computed of them.

    Compiled code reads W0 along its memory: of a column-major W0 it gets the transpose, and makes transposes.

    Attributes:
        adapter: that of W0, or of its transpose where `swapped`.
        layer: what compiled code is told of it; what the mask keeps is scaled.
        rows: W0's rows by block.
        cols: its columns.
        shapes: of each block of the adapter's weight.
        used: whether each block has a rank.
        batched: whether all blocks are one batched GEMM. It takes no slices: those of contiguous blocks are copied for
            it, where `batch` says so.
    """

    def __init__(self, adapter: PackedAdapter, mask: Mask | None, *, batch: bool) -> None:
        self.swapped = adapter.weight.stride(1) != 1
        self.adapter = along = adapter.T if self.swapped else adapter
        scale = 1.0 if mask is None else mask.scale
        self.layer = Layer(along.weight).adapt(along, along.A, along.B, scale).index(along)
        index, self.contiguous = self.layer.indices, along.partition.is_contiguous
        # By offsets, as compiled code goes: `from_tensors` believes the sizes that it is given.
        sizes = [[end - first for first, end in pairwise(offsets.tolist())] for offsets in index[2:]]
        self.shapes, self.used = list(zip(*sizes, strict=True)), adapter.host_ranks()
        alike = len(set(self.shapes)) == 1 and all(self.used)
        self.batched = alike and (batch or not self.contiguous)
        self.rows, self.cols = (
            Side(index[i], index[i + 2], sizes[i], contiguous=self.contiguous, batched=self.batched)
            for i in range(2)
        )
        if self.swapped:
            self.rows, self.cols = self.cols, self.rows

    def memory(self, floats: int) -> tuple[Tensor, int]:
        """Room for a matrix of each block's shape, and the address of a workspace of so many float32s behind it."""
        weight, count = self.adapter.weight, sum(rows * cols for rows, cols in self.shapes)
        count += count % 2  # two halves are a float32's place
        memory = in_large_pages(weight.new_empty(count + floats * 4 // weight.itemsize))
        return memory, memory.data_ptr() + count * weight.itemsize

    def deltas(self) -> Matrices:
        """ΔW_k (N_k, C_k) in W0's dtype, times what a mask scales by."""
        code, threads = library(), torch.get_num_threads()
        out, workspace = self.memory(code.smoa_deltas_workspace(self.layer, threads))
        with named(BLOCKS):
            code.smoa_deltas(self.layer, out.data_ptr(), workspace, threads)
        found = matrices(out, self.shapes, self.batched)
        return transposed(found) if self.swapped else found

    def panels(self, mask: Mask | None, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
        """The same tokens of the mask and of each tensor, some at a time; None of what is None."""
        tokens = next(one.shape[0] for one in tensors if one is not None)
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
        if isinstance(left, Tensor) and isinstance(right, Tensor) and isinstance(out, Tensor):
            _ = out.baddbmm_(left, right) if add else torch.bmm(left, right, out=out)
            return
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

    def __init__(self, blocks: Blocks) -> None:
        self._blocks, self._panels, A, B = blocks, 0, blocks.adapter.A, blocks.adapter.B
        self._dA, self._dB = A.new_empty(A.shape), B.new_empty(B.shape)
        floats = library().smoa_contract_workspace(blocks.layer, torch.get_num_threads())
        self._memory, self._workspace = blocks.memory(floats)

    def add(self, dy: Matrices, x: Matrices) -> None:
        """Take some tokens of both, in block order."""
        blocks, sums = self._blocks, self._memory.dtype == torch.float32
        left, right = (x, dy) if blocks.swapped else (dy, x)
        G = matrices(self._memory, blocks.shapes, blocks.batched)
        blocks.product(transposed(left), right, G, add=sums and self._panels > 0)
        if not sums:
            self._contract(add=self._panels > 0)
        self._panels += 1

    def _contract(self, *, add: bool) -> None:
        with named(BLOCKS):
            library().smoa_contract(
                self._blocks.layer, self._memory.data_ptr(), add, self._dA.data_ptr(), self._dB.data_ptr(),
                self._workspace, torch.get_num_threads(),
            )  # fmt: skip

    def found(self) -> tuple[Tensor, Tensor]:
        """(dA, dB) in the factors' dtype."""
        if self._memory.dtype == torch.float32:
            self._contract(add=False)
        if self._blocks.swapped:
            return self._dB.T.contiguous(), self._dA.T.contiguous()
        return self._dA, self._dB


def matrices(memory: Tensor, shapes: Sequence[tuple[int, int]], batched: bool) -> Matrices:
    """The matrices of these shapes that lie one after another in `memory`, which may have room for more."""
    if batched:
        rows, cols = shapes[0]
        return memory.as_strided((len(shapes), rows, cols), (rows * cols, cols, 1))
    first, found = 0, []
    for rows, cols in shapes:
        found.append(memory.as_strided((rows, cols), (cols, 1), first))
        first += rows * cols
    return found


def slices(x: Tensor, sizes: Sequence[int], batched: bool) -> Matrices:
    """The blocks' columns of x (T, all), which lie side by side."""
    tokens, stride = x.shape[0], x.stride(0)
    if batched:
        return x.as_strided((len(sizes), tokens, sizes[0]), (sizes[0], stride, 1))
    first, found = x.storage_offset(), []
    for size in sizes:
        found.append(x.as_strided((tokens, size), (stride, 1), first))
        first += size
    return found


def transposed(each: Matrices) -> Matrices:
    """The transpose of each."""
    return each.mT if isinstance(each, Tensor) else [one.mT for one in each]


def split(x: Tensor, adapter: PackedAdapter, mask: Mask | None) -> Tensor:
    """`x W0ᵀ + dropout(x) ΔWᵀ` (T, N): the adapter's output first, the base GEMM adds to it and rounds once."""
    adapter, x = _readable(adapter), with_rows(x)
    # A masked x is copied anyway.
    blocks = Blocks(adapter, mask, batch=mask is not None or _is_small(x, adapter))
    deltas = transposed(blocks.deltas())
    y = in_large_pages(x.new_empty(x.shape[0], adapter.weight.shape[0]))
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
        blocks = Blocks(adapter, mask, batch=mask is None and _is_small(dy, adapter))
        gradient = deltas = None
        if x is not None:
            x, gradient = with_rows(x), Gradient(blocks)
        if mask is not None and needs_x:
            dx = in_large_pages(dy.new_empty(dy.shape[0], adapter.weight.shape[1]))
            deltas = blocks.deltas()
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
    code, threads = library(), torch.get_num_threads()
    layer = Layer(along.weight).adapt(along, along.A, along.B).label(along)
    workspace = along.A.new_empty(code.smoa_modulate_workspace(layer, threads), dtype=torch.float32)

    def write(first: int, out: Tensor) -> Tensor:
        to, top, left = (out, first, 0) if swapped == transposed else (out.T, 0, first)
        with named(BLOCKS):
            code.smoa_modulate(
                layer, *to.shape, top, left, to.data_ptr(), to.stride(0), workspace.data_ptr(), threads
            )
        return out

    return write


def _is_small(tokens: Tensor, adapter: PackedAdapter) -> bool:
    """Whether a batch's copies cost less than the calls that it saves, and with G no more memory than dX's W_eff."""
    cols, count = adapter.weight.shape[1], adapter.partition.num_blocks
    return tokens.shape[0] <= min(HALF_TOKEN_PANEL, cols - cols // count)


def _readable(adapter: PackedAdapter) -> PackedAdapter:
    """The adapter with a W0 that has contiguous rows or columns."""
    weight = along_memory(adapter.weight)
    return adapter if weight is adapter.weight else replace(adapter, weight=weight)
