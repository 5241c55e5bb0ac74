"""The eager path's layout: rows and columns of a block side by side, and the copying that this takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .packed import PackedAdapter

__all__ = ["BlockOrder", "block_indices", "block_order", "inverse", "select_columns"]

# W0 is gathered this many whole rows at a time: what is read of them stays in cache.
_ROWS = 64


@dataclass(frozen=True)
class BlockOrder:
    """An adapter whose blocks are slices.

    Attributes:
        weight: W0 (N, C), as it is.
        A: (ρ, C), columns in block order, at least float32.
        B: (N, ρ), rows in block order, times s.
        row_index: coordinate of each row in block order; None where K = 1 and the order is W0's own.
        col_index: the same for columns.
        blocks: rank, rows and columns of each block that has a rank.
        num_blocks: K, blocks of rank zero counted.
    """

    weight: Tensor
    A: Tensor
    B: Tensor
    row_index: Tensor | None
    col_index: Tensor | None
    blocks: Sequence[tuple[int, slice, slice]]
    num_blocks: int

    @property
    def T(self) -> BlockOrder:
        """That of W_effᵀ."""
        return BlockOrder(
            weight=self.weight.T,
            A=self.B.T,
            B=self.A.T,
            row_index=self.col_index,
            col_index=self.row_index,
            blocks=[(rank, cols, rows) for rank, rows, cols in self.blocks],
            num_blocks=self.num_blocks,
        )

    def weights(self) -> Iterator[Tensor]:
        """`W0[rows_k, cols_k]` of every block, in W0's memory order; a copy unless K = 1."""
        if self.row_index is None or self.col_index is None:
            yield from (self.weight for _ in self.blocks)
        elif self.weight.stride(0) < self.weight.stride(1):
            yield from (block.T for block in self.T.weights())
        else:
            whole = self.weight.new_empty(_ROWS, self.weight.shape[1])
            for _, rows, cols in self.blocks:
                index = self.col_index[cols]
                block = self.weight.new_empty(rows.stop - rows.start, index.shape[0])
                for some, out in zip(self.row_index[rows].split(_ROWS), block.split(_ROWS), strict=True):
                    torch.index_select(self.weight, 0, some, out=whole[: some.shape[0]])
                    select_columns(whole[: some.shape[0]], index, out)
                yield block


def block_indices(adapter: PackedAdapter) -> tuple[Tensor | None, Tensor | None]:
    """Rows and columns block by block; None where K = 1 and the order is W0's own."""
    p = adapter.partition
    return (p.row_index, p.col_index) if p.num_blocks > 1 else (None, None)


def block_order(adapter: PackedAdapter) -> BlockOrder:
    """Of an adapter: its factors are copied, W0 is not."""
    p = adapter.partition
    # As wide as W0 and never narrower than float32: the factors are small, and products of them are not.
    dtype = torch.promote_types(adapter.weight.dtype, torch.float32)
    A, B = adapter.A.to(dtype), adapter.B.to(dtype)
    row_index, col_index = block_indices(adapter)
    if row_index is not None and col_index is not None:
        A, B = A.index_select(1, col_index), B.index_select(0, row_index)
    row_ends, col_ends = accumulate(p.row_sizes), accumulate(p.col_sizes)
    return BlockOrder(
        weight=adapter.weight,
        A=A,
        B=B * adapter.scaling,
        row_index=row_index,
        col_index=col_index,
        blocks=[
            (rank, slice(row_end - rows, row_end), slice(col_end - cols, col_end))
            for rank, row_end, rows, col_end, cols in zip(
                adapter.host_ranks(), row_ends, p.row_sizes, col_ends, p.col_sizes, strict=True
            )
            if rank
        ],
        num_blocks=p.num_blocks,
    )


def select_columns(x: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """`x[:, index]` of a matrix, written to `out`, by the fastest of torch's ways to copy columns."""
    if x.itemsize > 2:
        return torch.index_select(x, 1, index, out=out)
    # index_select has no fast path for half types, nor gather but for integers.
    torch.gather(x.view(torch.int16), 1, index.expand(x.shape[0], -1), out=out.view(torch.int16))
    return out


def inverse(index: Tensor) -> Tensor:
    """The permutation that undoes another."""
    return torch.empty_like(index).scatter_(0, index, torch.arange(index.shape[0], device=index.device))
