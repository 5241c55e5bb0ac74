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

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..definition.dropout import Dropout
from .common import (
    TOKENS_PER_DRAW,
    block_slots,
    dropout_draws,
    dropout_multiplier,
    round_to,
)
from .spec import INDEX, ONE_NUMBER, Config, Kernel, Operands, Work
from .table import select

__all__ = ["PERMUTE", "PermuteConfig", "gather_columns", "scatter_columns"]


@dataclass(frozen=True)
class PermuteConfig(Config):
    """One tile of gathered columns per program."""

    block_t: int
    block_p: int
    num_warps: int
    num_stages: int = 1


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
    SCATTER: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    # Neighbouring programs share their tokens: between them they touch whole rows of x while these are in cache.
    tile = tl.program_id(0)
    tiles_p = tl.cdiv(padded, BLOCK_P)
    tiles_per_row = num_blocks * tiles_p
    block = tile % tiles_per_row // tiles_p
    slots = tile % tiles_p * BLOCK_P + tl.arange(0, BLOCK_P)
    cols, valid = block_slots(index_ptr, offsets_ptr, block, slots)
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
        if SCATTER:
            value = tl.load(blocked_ptrs, mask=blocked_mask, other=0.0)
        else:
            value = tl.load(x_ptrs, mask=x_mask, other=0.0)
        if DROPOUT:
            value = value.to(tl.float32) * dropout_multiplier(draws, lane, threshold, scale)
        if SCATTER:
            tl.store(x_ptrs, round_to(value, x_ptr.dtype.element_ty), mask=x_mask)
        else:
            tl.store(blocked_ptrs, round_to(value, blocked_ptr.dtype.element_ty), mask=blocked_mask)


def gather_columns(
    x: Tensor,
    index: Tensor,
    offsets: Tensor,
    width: int,
    *,
    dropout: Dropout | None = None,
    config: PermuteConfig | None = None,
) -> Tensor:
    """Blocked copy (T, K, P) of x (T, C), zero in padding.

    Args:
        x: (T, C), any strides.
        index: int64 (C), columns grouped by block: `partition.col_index` (`row_index` for dY).
        offsets: int32 (K + 1), where each block starts in `index`.
        width: P, from :func:`padded_width`.
        dropout: multiply by its mask.
        config: launch parameters.
    """
    blocked = torch.empty(x.shape[0], offsets.shape[0] - 1, width, dtype=x.dtype, device=x.device)
    _launch(x, index, offsets, blocked, scatter=False, dropout=dropout, config=config)
    return blocked


def scatter_columns(
    blocked: Tensor,
    index: Tensor,
    offsets: Tensor,
    out: Tensor,
    *,
    dropout: Dropout | None = None,
    config: PermuteConfig | None = None,
) -> Tensor:
    """Write blocked (T, K, P), contiguous, into out (T, C), any strides: every column once; padding is dropped.

    The adjoint of :func:`gather_columns` for the same index, offsets and dropout. Returns `out`.
    """
    _launch(out, index, offsets, blocked, scatter=True, dropout=dropout, config=config)
    return out


def _launch(
    x: Tensor,
    index: Tensor,
    offsets: Tensor,
    blocked: Tensor,
    *,
    scatter: bool,
    dropout: Dropout | None,
    config: PermuteConfig | None,
) -> None:
    if blocked.numel() == 0:
        return
    tokens, num_blocks, width = blocked.shape
    config = config or select(
        "permute",
        x.device,
        x.dtype,
        blocks=num_blocks,
        in_features=x.shape[1],
        tokens=tokens,
        padded_in=width,
    )
    tiles = triton.cdiv(tokens, config.block_t) * num_blocks * triton.cdiv(width, config.block_p)
    permute_kernel[(tiles,)](
        x_ptr=x,
        index_ptr=index,
        offsets_ptr=offsets,
        seed_ptr=index if dropout is None else dropout.seed,
        blocked_ptr=blocked,
        T=tokens,
        num_blocks=num_blocks,
        padded=width,
        stride_xt=x.stride(0),
        stride_xc=x.stride(1),
        column_offset=0 if dropout is None else dropout.column_offset,
        threshold=0 if dropout is None else dropout.threshold,
        scale=1.0 if dropout is None else dropout.scale,
        SCATTER=scatter,
        DROPOUT=dropout is not None,
        BLOCK_T=config.block_t,
        BLOCK_P=config.block_p,
        **config.options,
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

    if "scatter" in operands.form:
        blocked = operands.tensor(key.tokens, key.blocks, key.padded_in)

    def run(config: Any) -> list[Tensor]:
        if "scatter" in operands.form:
            return [scatter_columns(blocked, p.col_index, p.col_offsets, x, dropout=dropout, config=config)]
        return [gather_columns(x, p.col_index, p.col_offsets, key.padded_in, dropout=dropout, config=config)]

    def defined(dtype: torch.dtype) -> list[Tensor]:
        gathered = x.new_zeros(key.tokens, key.blocks, key.padded_in, dtype=dtype)
        for k in range(key.blocks):
            gathered[:, k, : p.col_sizes[k]] = x[:, p.cols(k)].to(dtype)
        return [gathered]

    return run, defined


PERMUTE = Kernel(
    "permute",
    permute_kernel,
    PermuteConfig,
    role="copy",
    shipped=lambda arch, precision: _SHIPPED,
    steps={"block_t": (32, 64, 128), "block_p": (64, 128, 256), "num_warps": (2, 4, 8)},
    workload=_workload,
    forms=("gather", "gather dropout", "scatter", "scatter dropout"),
    narrow={
        "x_ptr": "gathered by columns",
        "index_ptr": INDEX,
        "offsets_ptr": INDEX,
        "seed_ptr": ONE_NUMBER,
    },
)
