# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The second half of `block_grad.py`: its partial sums of dA and dB, added in a fixed order, in one launch.

Layout of the pointers: partial_a (splits · row tiles, C, R) and partial_b (splits · column tiles, N, R) float32,
contiguous; row_label (N) and col_label (C), uint8 or int32; row_offsets, col_offsets (K + 1) and ranks (K) int32;
da (ρ, C) and db (N, ρ), any strides. R is ρ rounded up to a whole group of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..definition.partition import BlockPartition
from .common import SUM_CONFIGS, SUM_STEPS, SumConfig, round_to
from .launch import Launcher, Plan
from .sizes import PARTIAL_RANKS, partial_width
from .spec import INDEX, LABELS, Kernel, Operands, Work
from .table import remembered, select

__all__ = ["GROUP", "RANK_CHUNK", "SUM_PARTIALS", "sum_partials"]

# Ranks that the contraction takes at a time: the least that `tl.dot` takes, for the tile of G stays in registers.
RANK_CHUNK = 16
# Ranks of a group: float32 of 128 bits. Kernels are given groups, so that the compiler knows by what a row is aligned.
GROUP = tl.constexpr(PARTIAL_RANKS)


@triton.jit
def sum_tile(
    tile_m,
    partial_ptr,
    label_ptr,
    ranks_ptr,
    other_offsets_ptr,
    out_ptr,
    length,
    rank,
    rank_groups,
    splits,
    tiles,
    stride_om,
    stride_or,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[m, t] = Σ partial[:, m, t] over what the block of coordinate m wrote, 0 from its rank on.

    TILE is the gradient kernel's tile along the other side of W0: a block of that side's size fills that many of
    the `tiles` in each split, and the rest were never written.
    """
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    t = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = m < length
    block = tl.load(label_ptr + m, mask=inside, other=0).to(tl.int32)
    block_rank = tl.load(ranks_ptr + block)
    other_size = tl.load(other_offsets_ptr + block + 1) - tl.load(other_offsets_ptr + block)
    # Whole chunks of ranks are written, as far as rows are wide: a mask by rank would make every load a scalar one.
    width = rank_groups * GROUP
    inside_rank = inside & (tl.program_id(1) * BLOCK_R < block_rank)
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for split in range(splits):
        for tile in range(tiles):
            slot = (split * tiles + tile).to(tl.int64) * length
            written = inside_rank & (tile * TILE < other_size)
            partial_ptrs = partial_ptr + (slot + m)[:, None] * width + t[None, :]
            total += tl.load(partial_ptrs, mask=written[:, None] & (t < width)[None, :], other=0.0)
    total = tl.where(t[None, :] < block_rank[:, None], total, 0.0)
    out_ptrs = out_ptr + m[:, None] * stride_om + t[None, :] * stride_or
    tl.store(out_ptrs, round_to(total, out_ptr.dtype.element_ty), mask=inside[:, None] & (t < rank)[None, :])


@triton.jit(do_not_specialize=["rank_groups", "splits", "tiles_n", "tiles_c"])
def sum_partials_kernel(
    partial_a_ptr,
    partial_b_ptr,
    row_label_ptr,
    col_label_ptr,
    ranks_ptr,
    row_offsets_ptr,
    col_offsets_ptr,
    da_ptr,
    db_ptr,
    out_features,
    in_features,
    rank,
    rank_groups,
    splits,
    tiles_n,
    tiles_c,
    stride_ar,
    stride_ac,
    stride_bn,
    stride_br,
    TILE_N: tl.constexpr,
    TILE_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The first programs sum dB, a tile of W0's rows each, and the others dA, a tile of its columns."""
    tile = tl.program_id(0)
    first_tiles = tl.cdiv(out_features, BLOCK_M)
    if tile < first_tiles:
        sum_tile(
            tile,
            partial_b_ptr,
            row_label_ptr,
            ranks_ptr,
            col_offsets_ptr,
            db_ptr,
            out_features,
            rank,
            rank_groups,
            splits,
            tiles_c,
            stride_bn,
            stride_br,
            TILE_C,
            BLOCK_M,
            BLOCK_R,
        )
    else:
        sum_tile(
            tile - first_tiles,
            partial_a_ptr,
            col_label_ptr,
            ranks_ptr,
            row_offsets_ptr,
            da_ptr,
            in_features,
            rank,
            rank_groups,
            splits,
            tiles_n,
            stride_ac,
            stride_ar,
            TILE_N,
            BLOCK_M,
            BLOCK_R,
        )


launch_sum_partials = Launcher(sum_partials_kernel)


def sum_partials(
    partial_a: Tensor,
    partial_b: Tensor,
    partition: BlockPartition,
    ranks: Tensor,
    dA: Tensor,
    dB: Tensor,
    splits: int,
    tile: tuple[int, int],
    *,
    config: SumConfig | None = None,
) -> None:
    """Sum the partials of dA (slots, C, R) and of dB (slots, N, R) into dA (ρ, C) and dB (N, ρ), in one launch.

    Args:
        partial_a: `splits` times as many slots as a block of rows has tiles.
        partial_b: likewise of columns.
        partition: the blocks.
        ranks: of each block.
        dA: where to write.
        dB: likewise.
        splits: how many programs, and parts of the batch, shared the tokens of a tile.
        tile: rows and columns of the gradient kernel's tile.
        config: launch parameters.
    """
    plan = _plan(
        dB.device,
        dB.dtype,
        partial_a.shape,
        partial_b.shape,
        dB.shape[1],
        dA.stride(),
        dB.stride(),
        partition.num_blocks,
        splits,
        tile,
        config,
    )
    launch_sum_partials(
        plan,
        partial_a_ptr=partial_a,
        partial_b_ptr=partial_b,
        row_label_ptr=partition.row_block,
        col_label_ptr=partition.col_block,
        ranks_ptr=ranks,
        row_offsets_ptr=partition.row_offsets,
        col_offsets_ptr=partition.col_offsets,
        da_ptr=dA,
        db_ptr=dB,
    )


@remembered
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    partial_a_shape: Sequence[int],
    partial_b_shape: Sequence[int],
    rank: int,
    a_stride: Sequence[int],
    b_stride: Sequence[int],
    num_blocks: int,
    splits: int,
    tile: tuple[int, int],
    config: SumConfig | None,
) -> Plan:
    slots_a, in_features, width = partial_a_shape
    slots_b, out_features, _ = partial_b_shape
    tiles_n, tiles_c = slots_a // splits, slots_b // splits
    config = config or select(
        "sum_partials",
        device,
        dtype,
        rank=rank,
        blocks=num_blocks,
        out_features=out_features,
        in_features=in_features,
        padded_out=tiles_n * tile[0],
        padded_in=tiles_c * tile[1],
    )
    block_m = config.block // RANK_CHUNK
    return Plan(
        (-(-out_features // block_m) + -(-in_features // block_m), -(-width // RANK_CHUNK)),
        config,
        out_features=out_features,
        in_features=in_features,
        rank=rank,
        rank_groups=width // PARTIAL_RANKS,
        splits=splits,
        tiles_n=tiles_n,
        tiles_c=tiles_c,
        stride_ar=a_stride[0],
        stride_ac=a_stride[1],
        stride_bn=b_stride[0],
        stride_br=b_stride[1],
        TILE_N=tile[0],
        TILE_C=tile[1],
        BLOCK_M=block_m,
        BLOCK_R=RANK_CHUNK,
    )


def _workload(operands: Operands) -> Work:
    key = operands.key
    # How many parts there are, another kernel's configuration decides: a typical number.
    splits, tile = 2, (min(key.padded_out, 128), min(key.padded_in, 128))
    tiles_n, tiles_c = key.padded_out // tile[0], key.padded_in // tile[1]
    p, ranks, width = (
        operands.partition(key.out_features, key.in_features),
        operands.ranks(),
        partial_width(key.rank),
    )
    partial_a = operands.tensor(splits * tiles_n, key.in_features, width, dtype=torch.float32)
    partial_b = operands.tensor(splits * tiles_c, key.out_features, width, dtype=torch.float32)
    dA, dB = operands.tensor(key.rank, key.in_features), operands.tensor(key.out_features, key.rank)

    def run(config: Any) -> list[Tensor]:
        sum_partials(partial_a, partial_b, p, ranks, dA, dB, splits, tile, config=config)
        return [dA, dB]

    def summed(partial: Tensor, partition: BlockPartition, tile: int, dtype: torch.dtype) -> Tensor:
        # A block writes as many tiles as its other side fills; the rest is never read.
        sizes = partition.col_offsets.diff()[partition.row_block.long()]
        slots = torch.arange(partial.shape[0] // splits, device=operands.device)
        written = tile * slots[:, None] < sizes
        total = torch.where(written.repeat(splits, 1)[:, :, None], partial.to(dtype), 0).sum(0)
        return total[:, : key.rank]

    def defined(dtype: torch.dtype) -> list[Tensor]:
        return [summed(partial_a, p.T, tile[0], dtype).T, summed(partial_b, p, tile[1], dtype)]

    return run, defined


SUM_PARTIALS = Kernel(
    "sum_partials",
    sum_partials_kernel,
    SumConfig,
    role="copy",
    shipped=lambda arch, precision: SUM_CONFIGS,
    steps=SUM_STEPS,
    workload=_workload,
    forms=("dA and dB",),
    narrow={
        **dict.fromkeys(
            ("label_ptr", "row_label_ptr", "col_label_ptr", "ranks_ptr"), LABELS
        ),  # as sum_tile names them
        **dict.fromkeys(("other_offsets_ptr", "row_offsets_ptr", "col_offsets_ptr"), INDEX),
    },
)
