"""The eager path's layout, in which rows and columns of a block are adjacent, and the copies that it needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..definition.packed import PackedAdapter
from ..definition.partition import BlockPartition

# Bytes of W0 whose rows are gathered at a time: they are still in a cache when columns are taken from them. A
# block of 2048² in four costs 318 us with 64 rows and 278 with 256; at 4096x11008, 256 rows (11 MB) cost 11 % more.
_ROW_BYTES = 2**21


@dataclass(frozen=True)
class BlockOrder:
    """An adapter whose blocks are slices. Lists by block leave out blocks of rank zero."""

    weight: Tensor  # W0 (N, C), as it is
    A: Tensor  # (ρ, C), columns in block order, at least float32
    B: Tensor  # (N, ρ), rows in block order, times s
    ranks: Sequence[int]  # rank of each block
    partition: BlockPartition  # the blocks; where they are contiguous, block order is W0's own

    @property
    def full(self) -> bool:
        """Whether every block has rank ρ, so that writing all blocks of a factor writes all of it."""
        return min(self.ranks) == self.A.shape[0]

    def rows(self, tensor: Tensor, dim: int = 0) -> list[Tensor]:
        """Split a tensor, with all rows along `dim`, by block."""
        return self._parts(tensor, self.partition.row_sizes, dim)

    def cols(self, tensor: Tensor, dim: int = 1) -> list[Tensor]:
        """The same for columns."""
        return self._parts(tensor, self.partition.col_sizes, dim)

    def _parts(self, tensor: Tensor, sizes: Sequence[int], dim: int) -> list[Tensor]:
        parts = torch.split_with_sizes(tensor, sizes, dim)
        return [part for part, rank in zip(parts, self.ranks, strict=True) if rank]

    def places(self) -> list[tuple[slice, slice]]:
        """The slices of each block in W0, for contiguous blocks."""
        rows, cols = (
            [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
            for sizes in (self.partition.row_sizes, self.partition.col_sizes)
        )
        return [(row, col) for row, col, rank in zip(rows, cols, self.ranks, strict=True) if rank]

    def factors(self, A: Tensor, B: Tensor) -> list[tuple[Tensor, Tensor]]:
        """`A_k` (r_k, C_k) and `B_k` (N_k, r_k), views without the padding."""
        parts = list(zip(self.cols(A), self.rows(B), strict=True))
        if self.full:
            return parts
        pairs = zip(parts, filter(None, self.ranks), strict=True)
        return [(A_k[:rank], B_k[:, :rank]) for (A_k, B_k), rank in pairs]

    def weights(self) -> Iterator[Tensor]:
        """`W0[rows_k, cols_k]` of every block, in W0's memory order; views where blocks are contiguous, else copies."""
        if self.partition.is_contiguous:
            yield from (self.weight[rows, cols] for rows, cols in self.places())
        else:
            weight, turned = self.weight, self.weight.stride(0) < self.weight.stride(1)
            rows, cols = self.rows(self.partition.row_index), self.cols(self.partition.col_index, 0)
            if turned:  # columns are the rows of memory
                weight, rows, cols = weight.T, cols, rows
            count = max(16, _ROW_BYTES // max(1, weight.shape[1] * weight.itemsize))
            buffer = weight.new_empty(min(count, weight.shape[0]), weight.shape[1])
            for outer, inner in zip(rows, cols, strict=True):
                block = weight.new_empty(outer.shape[0], inner.shape[0])
                for some, out in zip(row_panels(outer, count), row_panels(block, count), strict=True):
                    panel = torch.index_select(weight, 0, some, out=buffer[: some.shape[0]])
                    select_columns(panel, inner, out)
                yield block.T if turned else block


def block_order(adapter: PackedAdapter) -> BlockOrder:
    """Build an adapter's BlockOrder. It copies the factors and references W0."""
    p = adapter.partition
    # W0's dtype, but at least float32: the factors take little memory, and their products round.
    dtype = torch.promote_types(adapter.weight.dtype, torch.float32)
    A, B = adapter.A.to(dtype), adapter.B.to(dtype)
    if not p.is_contiguous:
        A, B = A.index_select(1, p.col_index), B.index_select(0, p.row_index)
    return BlockOrder(adapter.weight, A, B * adapter.scaling, adapter.host_ranks(), p)


def row_panels(tensor: Tensor, rows: int) -> Sequence[Tensor]:
    """Cut a tensor into panels of at most `rows` rows."""
    # `split` runs in Python, which takes time in small layers.
    return (tensor,) if tensor.shape[0] <= rows else tensor.split(rows)


def select_columns(x: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """`x[:, index]` of a matrix, written to `out`."""
    if x.itemsize > 2:
        return torch.index_select(x, 1, index, out=out)
    # index_select has no fast path for half types, and gather only for integers.
    torch.gather(x.view(torch.int16), 1, index.expand(x.shape[0], -1), out=out.view(torch.int16))
    return out


def inverse(index: Tensor) -> Tensor:
    """The permutation that undoes another."""
    return torch.empty_like(index).scatter_(0, index, torch.arange(len(index), device=index.device))
