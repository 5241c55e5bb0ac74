# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Columns of an activation into the padded block-major layout, and back, with dropout on the way.

    gather:   blocked[t, k, p] = m[t, j] · x[t, j],  j in slot p of block k; 0 in padding      (T, K, P)
    scatter:  x[t, j] = m[t, j] · blocked[t, k, p]: its adjoint                                (T, C)

Every column is in one slot: scatter writes each element of x once, without atomics. m is 1, or dropout's 0 and
1/(1-p): one Philox word pair per (seed, token, global column), drawn anew where it is needed and never stored.

Layout of the pointers: x (T, C) with any strides; blocked (T, K, P) contiguous; index (C) int64 and offsets
(K + 1) int32 as the partition holds them; seed one int64 element (any pointer where there is no dropout).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..definition.dropout import Dropout
from ..definition.partition import BlockPartition
from .common import (
    TOKENS_PER_DRAW,
    block_slots,
    dropout_draws,
    dropout_multiplier,
    round_to,
)
from .launch import Launcher, Plan
from .spec import INDEX, ONE_NUMBER, Config, Kernel, Operands, Work
from .table import remembered, select

__all__ = ["GATHER_BOTH", "PERMUTE", "PermuteConfig", "gather_both", "gather_columns", "scatter_columns"]


@dataclass(frozen=True)
class PermuteConfig(Config):
    """One tile of gathered columns per program."""

    block_t: int
    block_p: int
    num_warps: int
    num_stages: int = 1


@triton.jit
def permute_tile(
    tile,
    x_ptr,
    index_ptr,
    offsets_ptr,
    seed_ptr,
    blocked_ptr,
    T,
    num_blocks,
    padded,
    stride_xt,
    stride_xc,
    column_offset,
    threshold,
    scale,
    GRANULE: tl.constexpr,
    SCATTER: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    # Neighbouring programs share their tokens: between them they touch whole rows of x while these are in cache.
    tiles_p = tl.cdiv(padded, BLOCK_P)
    tiles_per_row = num_blocks * tiles_p
    block = tile % tiles_per_row // tiles_p
    slots = tile % tiles_p * BLOCK_P + tl.arange(0, BLOCK_P)
    cols, valid = block_slots(index_ptr, offsets_ptr, block, slots, GRANULE)
    # One draw serves consecutive tokens, so the tile is walked as that many interleaved ones.
    GROUPS: tl.constexpr = BLOCK_T // TOKENS_PER_DRAW
    groups = tile // tiles_per_row * GROUPS + tl.arange(0, GROUPS)
    if DROPOUT:
        draws = dropout_draws(seed_ptr, groups, column_offset + cols)
    for lane in tl.static_range(TOKENS_PER_DRAW):
        tokens = groups.to(tl.int64) * TOKENS_PER_DRAW + lane
        x_ptrs = x_ptr + tokens[:, None] * stride_xt + cols[None, :] * stride_xc
        blocked_ptrs = blocked_ptr + (tokens[:, None] * num_blocks + block) * padded + slots[None, :]
        x_mask = (tokens < T)[:, None] & valid[None, :]
        blocked_mask = (tokens < T)[:, None] & (slots < padded)[None, :]
        # x in a shape of its own: in that of `blocked` it would have the same layout, eight slots a thread, and each
        # request would touch as many places of x as it has lanes. With one slot a thread, neighbouring lanes are at
        # neighbouring columns of a block, which lie close together.
        x_ptrs, x_mask = x_ptrs[:, None, :], x_mask[:, None, :]
        if SCATTER:
            value = tl.load(blocked_ptrs, mask=blocked_mask, other=0.0)
        else:
            value = tl.reshape(tl.load(x_ptrs, mask=x_mask, other=0.0), (GROUPS, BLOCK_P))
        if DROPOUT:
            value = value.to(tl.float32) * dropout_multiplier(draws, lane, threshold, scale)
        if SCATTER:
            value = round_to(value, x_ptr.dtype.element_ty)
            tl.store(x_ptrs, tl.reshape(value, (GROUPS, 1, BLOCK_P)), mask=x_mask)
        else:
            tl.store(blocked_ptrs, round_to(value, blocked_ptr.dtype.element_ty), mask=blocked_mask)


@triton.jit(do_not_specialize=["T", "column_offset", "threshold"])
def permute_kernel(
    x_ptr,
    index_ptr,
    offsets_ptr,
    seed_ptr,
    blocked_ptr,
    T,
    num_blocks,
    padded,
    stride_xt,
    stride_xc,
    column_offset,
    threshold,
    scale,
    GRANULE: tl.constexpr,
    SCATTER: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    permute_tile(
        tl.program_id(0),
        x_ptr,
        index_ptr,
        offsets_ptr,
        seed_ptr,
        blocked_ptr,
        T,
        num_blocks,
        padded,
        stride_xt,
        stride_xc,
        column_offset,
        threshold,
        scale,
        GRANULE,
        SCATTER,
        DROPOUT,
        BLOCK_T,
        BLOCK_P,
    )


launch_permute = Launcher(permute_kernel)


@triton.jit(do_not_specialize=["T", "first_tiles"])
def gather_both_kernel(
    dy_ptr,
    x_ptr,
    row_index_ptr,
    col_index_ptr,
    row_offsets_ptr,
    col_offsets_ptr,
    dyg_ptr,
    xg_ptr,
    T,
    first_tiles,
    num_blocks,
    padded_rows,
    padded_cols,
    stride_dyt,
    stride_dyc,
    stride_xt,
    stride_xc,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """What two launches of `permute_kernel` would: the first programs gather dY by rows of W0, the others x."""
    tile = tl.program_id(0)
    if tile < first_tiles:
        permute_tile(
            tile,
            dy_ptr,
            row_index_ptr,
            row_offsets_ptr,
            row_index_ptr,  # no seed
            dyg_ptr,
            T,
            num_blocks,
            padded_rows,
            stride_dyt,
            stride_dyc,
            0,
            0,
            1.0,
            1,
            False,
            False,
            BLOCK_T,
            BLOCK_P,
        )
    else:
        permute_tile(
            tile - first_tiles,
            x_ptr,
            col_index_ptr,
            col_offsets_ptr,
            col_index_ptr,
            xg_ptr,
            T,
            num_blocks,
            padded_cols,
            stride_xt,
            stride_xc,
            0,
            0,
            1.0,
            1,
            False,
            False,
            BLOCK_T,
            BLOCK_P,
        )


launch_gather_both = Launcher(gather_both_kernel)


def gather_columns(
    x: Tensor,
    index: Tensor,
    offsets: Tensor,
    width: int,
    *,
    granule: int = 1,
    dropout: Dropout | None = None,
    config: PermuteConfig | None = None,
) -> Tensor:
    """Blocked copy (T, K, P) of x (T, C), zero in padding.

    Args:
        x: (T, C), any strides.
        index: int64 (C), columns grouped by block: `partition.col_index` (`row_index` for dY).
        offsets: int32 (K + 1), where each block starts in `index`.
        width: P, from :func:`padded_width`.
        granule: from `spec.granule_of`.
        dropout: multiply by its mask.
        config: launch parameters.
    """
    blocked = x.new_empty(x.shape[0], offsets.shape[0] - 1, width)
    _launch(x, index, offsets, blocked, scatter=False, granule=granule, dropout=dropout, config=config)
    return blocked


def gather_both(
    dy: Tensor,
    x: Tensor,
    partition: BlockPartition,
    widths: tuple[int, int],
    *,
    config: PermuteConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """dY gathered by rows of W0 and x by columns, in one launch: two of :func:`gather_columns`.

    Args:
        dy: (T, N), any strides.
        x: (T, C) in dy's dtype, any strides.
        partition: blocks of W0's rows and columns.
        widths: P_n and P_c.
        config: launch parameters.
    """
    tokens, num_blocks = x.shape[0], partition.num_blocks
    dyg, xg = dy.new_empty(tokens, num_blocks, widths[0]), x.new_empty(tokens, num_blocks, widths[1])
    if not tokens:
        return dyg, xg
    plan = _plan_both(
        x.device, x.dtype, dy.shape, dy.stride(), x.shape, x.stride(), num_blocks, widths, config
    )
    launch_gather_both(
        plan,
        dy_ptr=dy,
        x_ptr=x,
        row_index_ptr=partition.row_index,
        col_index_ptr=partition.col_index,
        row_offsets_ptr=partition.row_offsets,
        col_offsets_ptr=partition.col_offsets,
        dyg_ptr=dyg,
        xg_ptr=xg,
    )
    return dyg, xg


@remembered
def _plan_both(
    device: torch.device,
    dtype: torch.dtype,
    dy_shape: Sequence[int],
    dy_stride: Sequence[int],
    x_shape: Sequence[int],
    x_stride: Sequence[int],
    num_blocks: int,
    widths: tuple[int, int],
    config: PermuteConfig | None,
) -> Plan:
    (tokens, in_features), (padded_rows, padded_cols) = x_shape, widths
    config = config or select(
        "gather_both",
        device,
        dtype,
        blocks=num_blocks,
        out_features=dy_shape[1],
        in_features=in_features,
        tokens=tokens,
        padded_out=padded_rows,
        padded_in=padded_cols,
    )
    rows = -(-tokens // config.block_t) * num_blocks
    first_tiles = rows * -(-padded_rows // config.block_p)
    return Plan(
        (first_tiles + rows * -(-padded_cols // config.block_p),),
        config,
        T=tokens,
        first_tiles=first_tiles,
        num_blocks=num_blocks,
        padded_rows=padded_rows,
        padded_cols=padded_cols,
        stride_dyt=dy_stride[0],
        stride_dyc=dy_stride[1],
        stride_xt=x_stride[0],
        stride_xc=x_stride[1],
        BLOCK_T=config.block_t,
        BLOCK_P=config.block_p,
    )


def scatter_columns(
    blocked: Tensor,
    index: Tensor,
    offsets: Tensor,
    out: Tensor,
    *,
    granule: int = 1,
    dropout: Dropout | None = None,
    config: PermuteConfig | None = None,
) -> Tensor:
    """Write blocked (T, K, P), contiguous, into out (T, C), any strides: every column once; padding is dropped.

    The adjoint of :func:`gather_columns` for the same index, offsets, granule and dropout. Returns `out`.
    """
    _launch(out, index, offsets, blocked, scatter=True, granule=granule, dropout=dropout, config=config)
    return out


def _launch(
    x: Tensor,
    index: Tensor,
    offsets: Tensor,
    blocked: Tensor,
    *,
    scatter: bool,
    granule: int,
    dropout: Dropout | None,
    config: PermuteConfig | None,
) -> None:
    if blocked.numel() == 0:
        return
    mask = None if dropout is None else (dropout.column_offset, dropout.threshold, dropout.scale)
    plan = _plan(x.device, x.dtype, x.shape[1], x.stride(), blocked.shape, granule, scatter, mask, config)
    launch_permute(
        plan,
        x_ptr=x,
        index_ptr=index,
        offsets_ptr=offsets,
        seed_ptr=index if dropout is None else dropout.seed,
        blocked_ptr=blocked,
    )


@remembered
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    features: int,
    stride: Sequence[int],
    blocked_shape: Sequence[int],
    granule: int,
    scatter: bool,
    mask: tuple[int, int, float] | None,
    config: PermuteConfig | None,
) -> Plan:
    tokens, num_blocks, width = blocked_shape
    config = config or select(
        "permute",
        device,
        dtype,
        blocks=num_blocks,
        in_features=features,
        tokens=tokens,
        padded_in=width,
        granule=granule,
    )
    column_offset, threshold, scale = mask or (0, 0, 1.0)
    return Plan(
        (-(-tokens // config.block_t) * num_blocks * -(-width // config.block_p),),
        config,
        T=tokens,
        num_blocks=num_blocks,
        padded=width,
        stride_xt=stride[0],
        stride_xc=stride[1],
        column_offset=column_offset,
        threshold=threshold,
        scale=scale,
        GRANULE=granule,
        SCATTER=scatter,
        DROPOUT=mask is not None,
        BLOCK_T=config.block_t,
        BLOCK_P=config.block_p,
    )


# Large enough for 128-bit accesses by 64-wide wavefronts too, in each of the tile's interleaved parts.
_SHIPPED = (
    PermuteConfig(block_t=64, block_p=128, num_warps=2),
    PermuteConfig(block_t=128, block_p=64, num_warps=2),
    PermuteConfig(block_t=128, block_p=128, num_warps=4),
)


def _workload(operands: Operands) -> Work:
    key = operands.key
    x = operands.tensor(key.tokens, key.in_features)
    p = operands.partition(key.in_features, key.in_features)
    dropout = None
    if "dropout" in operands.form:
        dropout = Dropout(torch.zeros(1, dtype=torch.int64, device=operands.device), 0.1)

    settings: dict[str, Any] = {"granule": key.granule, "dropout": dropout}
    if "scatter" in operands.form:
        blocked = operands.tensor(key.tokens, key.blocks, key.padded_in)

    def run(config: Any) -> list[Tensor]:
        if "scatter" in operands.form:
            return [scatter_columns(blocked, p.col_index, p.col_offsets, x, **settings, config=config)]
        return [gather_columns(x, p.col_index, p.col_offsets, key.padded_in, **settings, config=config)]

    return run, lambda dtype: [_gathered(x.to(dtype), p, key.padded_in)]


def _gathered(x: Tensor, partition: BlockPartition, width: int) -> Tensor:
    """What the definition gathers by columns."""
    gathered = x.new_zeros(x.shape[0], partition.num_blocks, width)
    for k, size in enumerate(partition.col_sizes):
        gathered[:, k, :size] = x[:, partition.cols(k)]
    return gathered


def _both_workload(operands: Operands) -> Work:
    key = operands.key
    dy, x = operands.tensor(key.tokens, key.out_features), operands.tensor(key.tokens, key.in_features)
    p, widths = operands.partition(key.out_features, key.in_features), (key.padded_out, key.padded_in)

    def run(config: Any) -> tuple[Tensor, Tensor]:
        return gather_both(dy, x, p, widths, config=config)

    def defined(dtype: torch.dtype) -> list[Tensor]:
        return [_gathered(dy.to(dtype), p.T, widths[0]), _gathered(x.to(dtype), p, widths[1])]

    return run, defined


PERMUTE = Kernel(
    "permute",
    permute_kernel,
    PermuteConfig,
    role="copy",
    shipped=lambda arch, precision: _SHIPPED,
    steps={"block_t": (32, 64, 128), "block_p": (64, 128, 256), "num_warps": (2, 4, 8)},
    workload=_workload,
    forms=(
        "gather",
        "gather dropout",
        "gather dropout granules",
        "scatter",
        "scatter dropout",
        "scatter dropout granules",
    ),
    narrow={
        "x_ptr": "gathered by columns",
        "index_ptr": INDEX,
        "offsets_ptr": INDEX,
        "seed_ptr": ONE_NUMBER,
    },
)
GATHER_BOTH = replace(
    PERMUTE,
    name="gather_both",
    fn=gather_both_kernel,
    workload=_both_workload,
    forms=("gather",),
    narrow={
        "x_ptr": "gathered by columns",  # as permute_tile names them
        "dy_ptr": "gathered by columns",
        **dict.fromkeys(
            (
                "index_ptr",
                "offsets_ptr",
                "row_index_ptr",
                "col_index_ptr",
                "row_offsets_ptr",
                "col_offsets_ptr",
            ),
            INDEX,
        ),
    },
)
