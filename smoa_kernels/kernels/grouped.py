# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""What the kernels over experts share: which tile a program computes, where coordinates lie, and an adapter's layout.

Pairs of a token and an expert are sorted by expert, and each expert's blocks of rows follow one another. Both are
**segments** that end where a tensor on the device says. A launch must not wait for it, so the grid has as many tiles as
there could be, and each program finds its own segment from the ends. Programs beyond the last tile return.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..definition.experts import ExpertBlocks, ExpertsAdapter, index_dtype
from .sizes import GRANULE
from .spec import Operands

__all__ = [
    "MOST_RANKS",
    "ExpertsLayout",
    "along_columns",
    "coordinates",
    "experts_operands",
    "experts_pointers",
    "power_of_two",
    "segment_of",
    "tiles_of_segments",
]

MOST_RANKS = 32
"""That a program takes at a time: with more of them the registers spill."""


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


def power_of_two(count: int) -> int:
    """At least `count`, and enough for a program's threads to reduce."""
    return max(16, 1 << (count - 1).bit_length())


def along_columns(adapter: ExpertsAdapter) -> ExpertsAdapter:
    """The adapter with A contiguous along C, as kernels read it: of a transposed adapter a copy, which is small."""
    return adapter if adapter.A.stride(2) == 1 else replace(adapter, A=adapter.A.contiguous())


class ExpertsLayout(NamedTuple):
    """What a plan depends on of an adapter of experts: plain values, as `launch.Layout`.

    Attributes:
        device: of all its tensors.
        dtype: W0's, and the activations'.
        shape: E, N and C.
        rank: ρ.
        num_blocks: K.
        granule: `GRANULE` where kernels may take so many adjacent coordinates as one, else 1.
        indexed: whether blocks are no slices.
        weight: W0's strides.
        A: A's strides.
        B: B's strides.
        offsets: how far one expert's block offsets lie from the next one's, of rows and of columns; 0 if shared.
        indices: likewise their indices.
    """

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, int, int]
    rank: int
    num_blocks: int
    granule: int
    indexed: bool
    weight: tuple[int, int, int]
    A: tuple[int, int, int]
    B: tuple[int, int, int]
    offsets: tuple[int, int]
    indices: tuple[int, int]

    @classmethod
    def of(cls, adapter: ExpertsAdapter) -> ExpertsLayout:
        """The layout of an adapter."""
        w, blocks = adapter.weight, adapter.blocks
        whole = all(size % GRANULE == 0 for size in (blocks.granule, *w.shape[1:]))
        apart: list[Any] = [
            0 if t is None or len(t) == 1 else t.stride(0)
            for t in (blocks.row_offsets, blocks.col_offsets, blocks.row_index, blocks.col_index)
        ]
        shape: Any = w.shape
        weight, A, B = (cast(tuple[int, int, int], t.stride()) for t in (w, adapter.A, adapter.B))
        return cls(
            w.device,
            w.dtype,
            shape,
            adapter.A.shape[1],
            blocks.num_blocks,
            GRANULE if whole else 1,
            not blocks.is_contiguous,
            weight,
            A,
            B,
            (apart[0], apart[1]),
            (apart[2], apart[3]),
        )

    def sizes(self, pairs: int) -> dict[str, int]:
        """As :func:`table.select` names them. `tokens` are the pairs that an expert has on average."""
        experts, rows, cols = self.shape
        return {
            "rank": self.rank,
            "blocks": self.num_blocks,
            "out_features": rows,
            "in_features": cols,
            "tokens": -(-pairs // max(experts, 1)),
            "granule": self.granule,
        }

    def strides(self) -> dict[str, int]:
        """As the kernels name them, in the order of their signatures."""
        names = ("we", "wn", "wc", "ae", "ar", "ac", "be", "bn", "br")
        apart = ("row_offsets", "col_offsets", "row_index", "col_index")
        numbers = (*self.weight, *self.A, *self.B, *self.offsets, *self.indices)
        return {f"stride_{name}": number for name, number in zip(names + apart, numbers, strict=True)}


def experts_pointers(adapter: ExpertsAdapter, ends: Tensor) -> dict[str, Tensor | None]:
    """What both kernels read of an adapter, as they name it, in the order of their signatures."""
    blocks = adapter.blocks
    return {
        "w_ptr": adapter.weight,
        "a_ptr": adapter.A,
        "b_ptr": adapter.B,
        "ends_ptr": ends,
        "row_index_ptr": blocks.row_index,
        "col_index_ptr": blocks.col_index,
        "row_offsets_ptr": blocks.row_offsets,
        "col_offsets_ptr": blocks.col_offsets,
        "ranks_ptr": adapter.ranks,
        "scaling_ptr": adapter.scaling,
    }


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
    sides = [torch.stack([operands.labels(size) for _ in range(EXPERTS)]) for size in (rows, cols)]
    counts = [torch.stack([label.bincount(minlength=key.blocks) for label in side]) for side in sides]
    row_offsets, col_offsets = (torch.nn.functional.pad(count.cumsum(1), (1, 0)).int() for count in counts)
    row_index, col_index = (side.argsort(dim=1, stable=True).to(index_dtype(side.shape[1])) for side in sides)
    blocks = ExpertBlocks(row_offsets, col_offsets, row_index, col_index, key.granule)
    if "contiguous" in operands.form:  # all experts' blocks have the same sizes
        blocks = ExpertBlocks(row_offsets[:1], col_offsets[:1], granule=key.granule)
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
