# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Base and adapter of all experts in one launch; with W0's strides swapped, dX.

    y[p] = x[p] · W0_eᵀ + x[p] · ΔW_eᵀ,   ΔW_e[i, j] = s · [b_e(i) = c_e(j)] · W0[e, i, j] · Σ_t B[e, i, t] A[e, t, j]

for each pair p (a row of x) of expert e. A program computes a tile of yᵀ: pairs of one expert, rows of one block k. It
first sums over the columns of block k, where it makes tiles of ΔW in registers. Then it sums over all columns with
tiles of W0 itself, into the same float32 accumulator. It rounds once: a ΔW added to W0 before the product would be lost
in W0's rounding (docs/numerics.md). So it multiplies 1 + 1/K times as much as the base does, and stores only y.

If blocks do not consist of granules, a block is read one number at a time. That is slow, so only the adapter's part
does it, and two launches share the work: first the adapter's part, block by block, into y; then the base's, in W0's own
order, added to y.

Layout of the pointers: x (P, C), a (E, ρ, C), last stride 1; w (E, N, C), b (E, N, ρ), any strides; ends (E) int32;
row_index (E or 1, N), col_index (E or 1, C), int16 or int32, or none; row_offsets, col_offsets (E or 1, K + 1) and
ranks (K) int32; scaling one element; out (P, N) contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..definition.experts import ExpertsAdapter
from .architectures import ADA, AMD, AMPERE, BLACKWELL, GEFORCE_BLACKWELL, HOPPER
from .common import (
    coordinates,
    dot,
    keep_in_registers,
    power_of_two,
    round_to,
    segment_of,
    tiles_of_segments,
    to_tf32,
)
from .launch import Launch, Layout, operands_of
from .spec import HALF, Config, Kernel, Key, Row, bucket, granule_of
from .table import cached

# Ranks that a program takes at a time; more would spill. A tile with more pairs takes fewer.
MOST_RANKS, FEW_RANKS, MOST_PAIRS = 32, 16, 128


@triton.jit
def through_registers(transposed_ptr, mask):
    """Load a tile of a transposed W0. As a function of its own, Triton loads it two steps ahead, into registers.

    The audit allows narrow loads through this pointer's name alone.
    """
    return tl.load(transposed_ptr, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["tiles_t", "tiles_n", "num_experts", "num_blocks", "rank"])
def grouped_linear_kernel(
    x_ptr, w_ptr, a_ptr, b_ptr, ends_ptr, row_index_ptr, col_index_ptr, row_offsets_ptr, col_offsets_ptr,
    ranks_ptr, scaling_ptr, out_ptr,
    tiles_t, tiles_n, num_experts, num_blocks, N, C, rank,
    stride_xp, stride_we, stride_wn, stride_wc, stride_ae, stride_ar, stride_ac, stride_be, stride_bn,
    stride_br, stride_row_index, stride_col_index, stride_row_offsets, stride_col_offsets,
    GRANULE: tl.constexpr, INDEXED: tl.constexpr, ADAPTER: tl.constexpr, BASE: tl.constexpr,
    W_TRANSPOSED: tl.constexpr, INPUT_PRECISION: tl.constexpr, EXPERTS: tl.constexpr, BLOCKS: tl.constexpr,
    RANK_BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr, GROUP_T: tl.constexpr,
):  # fmt: skip
    # GROUP_T tiles of pairs are innermost: tiles of one expert read the same tile of W0.
    tiles_per_group = GROUP_T * tiles_n
    first_tile_t = tl.program_id(0) // tiles_per_group * GROUP_T
    group = min(tiles_t - first_tile_t, GROUP_T)
    place = tl.program_id(0) % tiles_per_group
    tile_n = place // group
    expert, pair, pair_end = segment_of(ends_ptr, num_experts, first_tile_t + place % group, BLOCK_T, EXPERTS)
    if pair >= pair_end:
        return
    expert = expert.to(tl.int64)
    if ADAPTER:
        row_ends_ptr = row_offsets_ptr + expert * stride_row_offsets + 1
        block, row, row_end = segment_of(row_ends_ptr, num_blocks, tile_n, BLOCK_N, BLOCKS)
    else:
        block, row, row_end = 0, tile_n * BLOCK_N, N
    if row >= row_end:
        return
    pairs = pair + tl.arange(0, BLOCK_T)
    pair_valid = pairs < pair_end
    x_rows = x_ptr + pairs.to(tl.int64) * stride_xp
    row_index_of = row_index_ptr + expert * stride_row_index if ADAPTER and INDEXED else row_index_ptr
    rows, row_valid = coordinates(row_index_of, row, row_end, GRANULE, ADAPTER and INDEXED, BLOCK_N)

    w_rows = w_ptr + expert * stride_we + rows * stride_wn
    out_mask = pair_valid[:, None] & row_valid[None, :]
    # A wide tile makes its pointers last: they do not fit in the registers beside the accumulator.
    LATE: tl.constexpr = ADAPTER and BASE and BLOCK_T > 128
    if not LATE:
        out_ptrs = out_ptr + pairs.to(tl.int64)[:, None] * N + rows[None, :]
    # float16 would lose a small ΔW / s to underflow. The other types round ΔW and ΔW / s equally well.
    SCALES_FIRST: tl.constexpr = w_ptr.dtype.element_ty == tl.float16
    if ADAPTER:
        acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        a_ptr += expert * stride_ae
        b_ptr += expert * stride_be
        col_offsets_ptr += expert * stride_col_offsets
        col_index_of = col_index_ptr + expert * stride_col_index if INDEXED else col_index_ptr
        col_start, col_end = tl.load(col_offsets_ptr + block), tl.load(col_offsets_ptr + block + 1)
        scaling = tl.load(scaling_ptr).to(tl.float32)
        block_rank = tl.minimum(tl.load(ranks_ptr + block), rank)
        for start in range(0, block_rank, RANK_BLOCK):
            t = start + tl.arange(0, RANK_BLOCK)
            b_ptrs = b_ptr + rows[:, None] * stride_bn + t[None, :] * stride_br
            b = tl.load(b_ptrs, mask=row_valid[:, None] & (t < block_rank)[None, :], other=0.0)
            b = to_tf32(b, INPUT_PRECISION)
            for col in range(col_start, col_end, BLOCK_D):
                cols, col_valid = coordinates(col_index_of, col, col_end, GRANULE, INDEXED, BLOCK_D)
                w_ptrs = w_rows[:, None] + cols[None, :] * stride_wc
                w_mask = row_valid[:, None] & col_valid[None, :]
                if W_TRANSPOSED:
                    w = through_registers(w_ptrs, w_mask)
                else:
                    w = tl.load(w_ptrs, mask=w_mask, other=0.0)
                x_ptrs = x_rows[None, :] + cols[:, None]
                x = tl.load(x_ptrs, mask=pair_valid[None, :] & col_valid[:, None], other=0.0)
                a_ptrs = a_ptr + t[:, None] * stride_ar + cols[None, :] * stride_ac
                a = tl.load(a_ptrs, mask=(t < block_rank)[:, None] & col_valid[None, :], other=0.0)
                a = to_tf32(a, INPUT_PRECISION)
                product = dot(b, a, tl.zeros((BLOCK_N, BLOCK_D), tl.float32), INPUT_PRECISION)
                if SCALES_FIRST:
                    product *= scaling
                delta = round_to(product * w.to(tl.float32), w.dtype)
                acc = dot(delta, x, acc, INPUT_PRECISION)
        if not SCALES_FIRST:
            acc *= scaling
    else:
        acc = tl.trans(tl.load(out_ptrs, mask=out_mask, other=0.0).to(tl.float32))

    if BASE:
        for col in range(0, C, BLOCK_C):
            cols = col + tl.arange(0, BLOCK_C)
            col_valid = cols < C
            cols = cols.to(tl.int64)
            w_ptrs = w_rows[:, None] + cols[None, :] * stride_wc
            w = tl.load(w_ptrs, mask=row_valid[:, None] & col_valid[None, :], other=0.0)
            x_ptrs = x_rows[None, :] + cols[:, None]
            x = tl.load(x_ptrs, mask=pair_valid[None, :] & col_valid[:, None], other=0.0)
            if W_TRANSPOSED and w.dtype == tl.float32:
                w = keep_in_registers(w, row_valid[:, None])
            acc = dot(w, x, acc, INPUT_PRECISION)

    if LATE:
        out_ptrs = out_ptr + pairs.to(tl.int64)[:, None] * N + rows[None, :]
    tl.store(out_ptrs, round_to(tl.trans(acc), out_ptr.dtype.element_ty), mask=out_mask)


def grouped_linear(x: Tensor, ends: Tensor, adapter: ExpertsAdapter) -> Tensor:
    """`y_p = x_p W_effᵀ` (P, N) with the W_eff of pair p's expert, in x's dtype; `adapter.T` makes it dX.

    Args:
        x: (P, C) sorted by expert, in W0's dtype.
        ends: int32 (E,), where the pairs of each expert end; the last is P.
        adapter: of the experts, on x's device.
    """
    operands = operands_of(adapter)
    layout = operands.layout
    y = x.new_empty(x.shape[0], layout.features[0])
    if y.numel() == 0:
        return y
    if layout.features[1] == 0:
        return y.zero_()
    x = x if x.stride(1) == 1 else x.contiguous()
    # Two launches if the adapter's part reads one number at a time.
    together = layout.granule > 1 or layout.num_blocks == 1
    pairs, experts = x.shape[0], layout.experts
    pointers = {"x_ptr": x, "ends_ptr": ends, "out_ptr": y, **operands.pointers}
    for parts in ((True, True),) if together else ((True, False), (False, True)):
        launch, tiles_n = _launch(layout, bucket(-(-pairs // experts)), x.stride(0), *parts)
        tiles_t = tiles_of_segments(pairs, experts, launch.config.block_t)
        launch((tiles_t * tiles_n, 1, 1), pointers, (tiles_t,))
    return y


@cached
def _launch(layout: Layout, tokens: int, stride_xp: int, adapter: bool, base: bool) -> tuple[Launch, int]:
    """The launch for an average number of an expert's pairs, and the number of tiles of rows."""
    N = layout.features[0]
    kernel = GROUPED_LINEAR if base else GROUPED_LINEAR_GATHERED
    config = layout.choose(kernel, tokens=tokens, granule=layout.granule, transposed=layout.transposed)
    blocks = layout.num_blocks if adapter else 1
    tiles_n = tiles_of_segments(N, blocks, config.block_n)
    launch = Launch(
        grouped_linear_kernel,
        config,
        layout,
        tiles_n=tiles_n,
        num_experts=layout.experts,
        num_blocks=blocks,
        stride_xp=stride_xp,
        GRANULE=layout.granule if adapter else granule_of(0, (N,)),
        ADAPTER=adapter,
        BASE=base,
        EXPERTS=power_of_two(layout.experts, 16),
        BLOCKS=power_of_two(blocks, 16),
        RANK_BLOCK=min(
            FEW_RANKS if config.block_t > MOST_PAIRS else MOST_RANKS, power_of_two(layout.rank, 16)
        ),
    )
    return launch, tiles_n


def _choose(shipped: Sequence[Config], key: Key, multiprocessors: int) -> Config:
    """Choose the widest tile of which an expert has two on average: its last tile is half empty.

    A tile of 256 pairs takes 16 ranks at a time and reads x anew for the next 16. It needs base and adapter in one
    launch.
    """
    if key.rank > FEW_RANKS or key.granule == 1:
        shipped = [config for config in shipped if config.block_t <= MOST_PAIRS]
    return next((config for config in shipped if 2 * config.block_t <= key.tokens), shipped[-1])


def _fits(config: Config, key: Key) -> bool:
    """The accumulator has 8 to 128 numbers a thread, and a tile is not much wider than an expert's pairs."""
    most = 256 if key.rank <= FEW_RANKS and key.granule > 1 else MOST_PAIRS
    widest = min(most, max(32, key.tokens))
    return (
        widest // 2 <= config.block_t <= widest
        and config.block_d <= config.block_c
        and min(32, config.block_t // 2) <= config.block_t * config.block_n // (32 * config.num_warps) <= 128
    )


def _tile(t: int, n: int, c: int, d: int, warps: int, stages: int) -> Config:
    tile: dict[str, Any] = {"block_t": t, "block_n": n, "block_c": c, "block_d": d, "group_t": 8}
    return Config(**tile, num_warps=warps, num_stages=stages)


_LARGE, _FEW = _tile(64, 128, 64, 32, 8, 3), _tile(16, 64, 64, 64, 4, 3)
_HOPPER = _tile(128, 128, 64, 32, 8, 3), _tile(64, 128, 64, 64, 8, 3), _FEW
_TF32, _TF32_SHORT = _tile(64, 64, 32, 32, 8, 3), _tile(64, 64, 32, 16, 8, 3)

# What rows replace spills 4 to 88 bytes before the Triton that they name; by 3.9 TF32 spills 12 bytes on sm_100.
# IEEE float32: NVIDIA has no tensor cores for it, and a thread holds the whole depth of its operands in registers.
GROUPED_LINEAR = Kernel(
    "grouped_linear",
    grouped_linear_kernel,
    rows=(
        Row(AMD, (), (_tile(64, 128, 64, 32, 4, 2), _tile(16, 64, 64, 64, 2, 2))),
        Row(BLACKWELL, ("tf32",), (_tile(32, 64, 32, 32, 4, 3),), before="3.9"),
        Row((), ("tf32",), (_TF32_SHORT,), before="3.9"),
        Row(BLACKWELL, ("tf32",), (_TF32_SHORT,)),
        Row((), ("tf32",), (_TF32,)),
        Row(BLACKWELL, ("fp32",), (_tile(32, 64, 16, 16, 4, 3),)),
        Row(GEFORCE_BLACKWELL, ("fp32",), (_tile(32, 32, 16, 16, 4, 2),), before="3.8"),
        Row((), ("fp32",), (_tile(32, 32, 16, 16, 4, 3),), before="3.8"),
        Row((), ("fp32",), (_tile(32, 64, 16, 16, 4, 3),)),
        Row(HOPPER, HALF, _HOPPER, before="3.7"),
        Row(HOPPER, HALF, (_tile(256, 128, 32, 16, 8, 3), *_HOPPER)),
        Row(AMPERE, HALF, (_LARGE, replace(_FEW, num_stages=4)), before="3.7"),
        Row(GEFORCE_BLACKWELL, HALF, (_LARGE, replace(_FEW, num_stages=2)), before="3.7"),
        Row((), HALF, (_LARGE, _FEW)),
    ),
    choose=_choose,
    space={
        "block_t": (16, 32, 64, 128, 256),
        "block_n": (64, 128),
        "block_c": (32, 64),
        "block_d": (16, 32),
        "num_warps": (4, 8),
        "num_stages": (2, 3),
    },
    fits=_fits,
    # Every tile of pairs reads W0, every tile of rows x.
    traffic=lambda config, key: (
        2 * key.in_features * key.out_features * -(-key.tokens // config.block_t)
        + 2 * key.tokens * key.in_features * -(-key.out_features // config.block_n)
    ),
)
# Shorter steps where operands are read one number at a time: each address takes registers. Of nine tried with Triton
# 3.6 only that of its row does not spill. Four warps spill on sm_100, and 76 bytes in TF32.
GROUPED_LINEAR_GATHERED = replace(
    GROUPED_LINEAR,
    name="grouped_linear_gathered",
    rows=(
        Row(AMD, (), (_tile(16, 64, 64, 16, 2, 2),)),
        Row((), ("tf32",), (_TF32_SHORT,), before="3.9"),
        Row(BLACKWELL, ("tf32",), (_TF32,)),
        Row((), ("tf32",), (_TF32_SHORT,)),
        Row(ADA, ("fp32",), (_tile(16, 16, 16, 16, 4, 2),), before="3.7"),
        Row((), ("fp32",), (_tile(16, 32, 16, 16, 4, 2),)),
        Row(BLACKWELL, HALF, (_tile(16, 64, 64, 16, 8, 2),), before="3.9"),
        Row(BLACKWELL, HALF, (_tile(16, 64, 64, 16, 8, 3),)),
        Row(HOPPER, HALF, (_tile(16, 64, 64, 16, 4, 3),)),
        Row(GEFORCE_BLACKWELL, HALF, (_tile(16, 32, 64, 32, 4, 3),), before="3.7"),
        Row(GEFORCE_BLACKWELL, HALF, (_tile(16, 64, 64, 16, 4, 3),)),
        Row((), HALF, (_tile(16, 32, 64, 32, 4, 3),), before="3.9"),
        Row((), HALF, (_tile(16, 64, 64, 16, 4, 3),)),
    ),
)
