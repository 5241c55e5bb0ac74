# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""What the kernels over experts share: which tile a program computes, where coordinates lie, and a workload.

Pairs of a token and an expert are sorted by expert, and each expert's blocks of rows follow one another. Both are
**segments** that end where a tensor on the device says. A launch must not wait for it, so the grid has as many tiles as
there could be, and each program finds its own segment from the ends. Programs beyond the last tile return.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..definition.experts import ExpertBlocks, ExpertsAdapter
from .launch import Layout
from .spec import Operands

__all__ = [
    "along_columns",
    "coordinates",
    "experts_operands",
    "experts_sizes",
    "segment_of",
    "tiles_of_segments",
]


@triton.jit
def segment_of(ends_ptr, segments, tile, BLOCK: tl.constexpr, SEGMENTS: tl.constexpr):
    """The segment whose tile is number `tile`, where that tile begins, and where the segment ends.

    Every segment is cut into tiles of BLOCK of its own. Past the last tile, the tile begins where it ends: at 0.
    """
    each = tl.arange(0, SEGMENTS)
    inside = each < segments
    ends = tl.load(ends_ptr + each, mask=inside, other=0)
    starts = tl.load(ends_ptr + each - 1, mask=inside & (each > 0), other=0)
    tiles = tl.where(inside, (ends - starts + BLOCK - 1) // BLOCK, 0)
    last = tl.cumsum(tiles, 0)
    segment = tl.sum((last <= tile).to(tl.int32), 0)
    here = each == segment
    first = tl.sum(tl.where(here, starts + (tile - last + tiles) * BLOCK, 0), 0)
    return segment, first, tl.sum(tl.where(here, ends, 0), 0)


def tiles_of_segments(length: int, segments: int, block: int) -> int:
    """The most tiles that so many segments of `length` in all can have: each but one ends in a tile of one."""
    most = min(length, segments)
    return (length - most) // block + most


@triton.jit
def coordinates(index_ptr, first, end, GRANULE: tl.constexpr, INDEXED: tl.constexpr, BLOCK: tl.constexpr):
    """The coordinates (int64) that BLOCK slots from `first` on hold, and which of them lie before `end`.

    GRANULE is a power of two that divides `first` and `end`, and that many slots hold adjacent coordinates of which the
    first is a multiple of it. The compiler is told, so that what lies there is moved as vectors.
    """
    # Changes nothing: the compiler sees it, and forgets `tl.multiple_of` on what a reduction or a loop gives. With that
    # instead, grouped_grad in bf16 loads 2 bytes at a time and spills 248 (Triton 3.9, sm_90).
    first = first // GRANULE * GRANULE
    slots = first + tl.arange(0, BLOCK)
    if GRANULE == 1:
        valid = slots < end
    else:
        valid = slots // GRANULE < end // GRANULE  # the same for a whole granule, as the compiler sees
    if INDEXED:
        found = tl.load(index_ptr + slots, mask=valid, other=0).to(tl.int64)
        found = tl.max_contiguous(tl.multiple_of(found, GRANULE), GRANULE)
    else:
        found = slots.to(tl.int64)
    return found, valid


def along_columns(adapter: ExpertsAdapter) -> ExpertsAdapter:
    """The adapter with A contiguous along C, as kernels read it: of a transposed adapter a copy, which is small."""
    return adapter if adapter.A.stride(2) == 1 else replace(adapter, A=adapter.A.contiguous())


def experts_sizes(layout: Layout, pairs: int) -> dict[str, int | bool]:
    """What a choice depends on besides an adapter. `tokens` are the pairs that an expert has on average."""
    tokens = -(-pairs // max(layout.experts, 1))
    return {"tokens": tokens, "granule": layout.granule, "transposed": layout.transposed}


EXPERTS = 4
"""In a workload."""


def experts_operands(operands: Operands) -> tuple[ExpertsAdapter, Tensor, Tensor, Tensor]:
    """An adapter of a key's sizes, where pairs of its experts end, x and dY: `tokens` pairs an expert on average.

    Blocks are contiguous where the form says so, else in an order of each expert's own.
    """
    key, device = operands.key, operands.device
    rows, cols = key.out_features, key.in_features
    if key.transposed:
        rows, cols = cols, rows
    row_block, col_block = (
        torch.stack([operands.labels(size) for _ in range(EXPERTS)]) for size in (rows, cols)
    )
    if "contiguous" in operands.form:
        row_block, col_block = row_block.sort(1).values, col_block.sort(1).values
    blocks = ExpertBlocks.from_labels(row_block, col_block, key.blocks)
    adapter = ExpertsAdapter(
        weight=operands.tensor(EXPERTS, rows, cols) / cols**0.5,
        A=operands.tensor(EXPERTS, key.rank, cols, dtype=operands.factor_dtype),
        B=operands.tensor(EXPERTS, rows, key.rank, dtype=operands.factor_dtype) / key.rank**0.5,
        blocks=blocks,
        ranks=operands.ranks(),
        scaling=torch.ones((), device=device),
    )
    if key.transposed:
        adapter = adapter.T
    # One expert has nearly all that another lacks.
    pairs = EXPERTS * key.tokens
    ends = torch.tensor([key.tokens, 2 * key.tokens + key.tokens // 2, 3 * key.tokens, pairs]).int()
    x, dy = operands.tensor(pairs, key.in_features), operands.tensor(pairs, key.out_features)
    return adapter, ends.to(device), x, dy
