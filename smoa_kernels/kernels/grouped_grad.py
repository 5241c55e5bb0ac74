# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""dA and dB of all experts in one launch.

    G = dY_eᵀ · X_e,   H = s · G ∘ W0_e,   dB_e[rows_k] = H[rows_k, cols_k] · A_e[:, cols_k]ᵀ
                                           dA_e[:, cols_k] = B_e[rows_k]ᵀ · H[rows_k, cols_k]

over the pairs of each expert e and its blocks k. A program owns some rows of one block. It goes over that block's
columns, makes one tile of G after another in registers, multiplies it by W0's and contracts it with A's and with B's.
It writes each row of dB once, and its own rows' part of dA in float32; torch sums these parts. There are no atomics, so
two runs agree bit for bit. An expert without pairs gets zeros.

Layout of the pointers: dy (P, N), x (P, C), a (E, ρ, C), last stride 1; w (E, N, C), b (E, N, ρ), any strides;
partial_a (experts of the launch, tiles of rows, ρ, C) float32, zeros, and db (E, N, ρ), contiguous; ends, indices,
offsets, ranks and scaling as in `grouped_linear.py`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..definition.experts import ExpertsAdapter
from .architectures import AMD, AMPERE, BLACKWELL, GEFORCE_BLACKWELL, HOPPER
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
from .launch import Grid, Launch, Layout, operands_of
from .spec import HALF, Config, Kernel, Row, bucket
from .table import cached

RANKS = 16
"""Ranks of a program; further ranks take further programs, which compute G anew. With more, registers spill."""


@triton.jit(do_not_specialize=["first_expert", "tiles_n", "parts", "num_blocks", "rank"])
def grouped_grad_kernel(
    dy_ptr, x_ptr, w_ptr, a_ptr, b_ptr, ends_ptr, row_index_ptr, col_index_ptr, row_offsets_ptr,
    col_offsets_ptr, ranks_ptr, scaling_ptr, partial_a_ptr, db_ptr,
    first_expert, tiles_n, parts, num_blocks, N, C, rank,
    stride_dyp, stride_xp, stride_we, stride_wn, stride_wc, stride_ae, stride_ar, stride_ac, stride_be,
    stride_bn, stride_br, stride_row_index, stride_col_index, stride_row_offsets, stride_col_offsets,
    GRANULE: tl.constexpr, INDEXED: tl.constexpr, INPUT_PRECISION: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) // tiles_n
    number = first_expert + place
    expert = number.to(tl.int64)
    row_ends_ptr = row_offsets_ptr + expert * stride_row_offsets + 1
    block, row, row_end = segment_of(row_ends_ptr, num_blocks, tl.program_id(0) % tiles_n, BLOCK_N, BLOCKS)
    if row >= row_end:
        return
    row_index_of = row_index_ptr + expert * stride_row_index if INDEXED else row_index_ptr
    col_index_of = col_index_ptr + expert * stride_col_index if INDEXED else col_index_ptr
    rows, row_valid = coordinates(row_index_of, row, row_end, GRANULE, INDEXED, BLOCK_N)
    col_offsets_ptr += expert * stride_col_offsets
    col_start, col_end = tl.load(col_offsets_ptr + block), tl.load(col_offsets_ptr + block + 1)
    pair_start = tl.load(ends_ptr + number - 1, mask=number > 0, other=0)
    pair_end = tl.load(ends_ptr + number)
    t = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    block_rank = tl.minimum(tl.load(ranks_ptr + block), rank)
    # With nothing to sum over there is no step, so that a NaN of W0 does not reach the gradient.
    some = (pair_start < pair_end) & (tl.program_id(1) * BLOCK_R < block_rank)
    col_end = tl.where(some, col_end, col_start)

    w_ptr += expert * stride_we
    a_ptr += expert * stride_ae
    b_ptr += expert * stride_be
    scaling = tl.load(scaling_ptr).to(tl.float32)
    b_ptrs = b_ptr + rows[:, None] * stride_bn + t[None, :] * stride_br
    row_start = tl.load(row_offsets_ptr + expert * stride_row_offsets + block)
    part = place.to(tl.int64) * parts + (row - row_start) // BLOCK_N
    partial_a_ptr += part * rank * C
    slots_t = tl.arange(0, BLOCK_T)
    db = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for col in range(col_start, col_end, BLOCK_C):
        cols, col_valid = coordinates(col_index_of, col, col_end, GRANULE, INDEXED, BLOCK_C)
        # Loaded before the sum over pairs, which hides the load.
        w_offsets = rows[:, None] * stride_wn + cols[None, :] * stride_wc
        w_mask = row_valid[:, None] & col_valid[None, :]
        weight = tl.load(w_ptr + w_offsets, mask=w_mask, other=0.0)
        grad = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        for pair in range(pair_start, pair_end, BLOCK_T):
            pair_valid = slots_t < pair_end - pair
            pairs = (pair + slots_t).to(tl.int64)
            dy_ptrs = dy_ptr + pairs[None, :] * stride_dyp + rows[:, None]
            dy = tl.load(dy_ptrs, mask=pair_valid[None, :] & row_valid[:, None], other=0.0)
            x_ptrs = x_ptr + pairs[:, None] * stride_xp + cols[None, :]
            x = tl.load(x_ptrs, mask=pair_valid[:, None] & col_valid[None, :], other=0.0)
            if x.dtype == tl.float32 and INPUT_PRECISION == "tf32":
                dy = keep_in_registers(dy, pair_valid[None, :])
                x = keep_in_registers(x, pair_valid[:, None])
            grad = dot(dy, x, grad, INPUT_PRECISION)
        a_ptrs = a_ptr + cols[:, None] * stride_ac + t[None, :] * stride_ar
        a = tl.load(a_ptrs, mask=col_valid[:, None] & (t < block_rank)[None, :], other=0.0)
        h = to_tf32(grad * weight.to(tl.float32), INPUT_PRECISION)
        db = dot(h, to_tf32(a.to(tl.float32), INPUT_PRECISION), db, INPUT_PRECISION)
        b = tl.load(b_ptrs, mask=row_valid[:, None] & (t < block_rank)[None, :], other=0.0)
        da = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
        da = dot(tl.trans(h), to_tf32(b.to(tl.float32), INPUT_PRECISION), da, INPUT_PRECISION)
        da_ptrs = partial_a_ptr + t[None, :] * C + cols[:, None]
        tl.store(da_ptrs, scaling * da, mask=col_valid[:, None] & (t < block_rank)[None, :])

    db_ptrs = db_ptr + (expert * N + rows)[:, None] * rank + t[None, :]
    mask = row_valid[:, None] & (t < rank)[None, :]
    tl.store(db_ptrs, round_to(scaling * db, db_ptr.dtype.element_ty), mask=mask)


def grouped_grad(dy: Tensor, x: Tensor, ends: Tensor, adapter: ExpertsAdapter) -> tuple[Tensor, Tensor]:
    """dA (E, ρ, C) and dB (E, N, ρ) in the factors' dtypes; rows and columns t ≥ r_k are exactly 0.

    Args:
        dy: (P, N) sorted by expert, in W0's dtype.
        x: (P, C), sorted by expert, in W0's dtype.
        ends: int32 (E,), where the pairs of each expert end; the last is P.
        adapter: of the experts, on x's device.
    """
    A, B = adapter.A, adapter.B
    if A.numel() == 0 or B.numel() == 0:
        return torch.zeros_like(A), torch.zeros_like(B)
    operands = operands_of(adapter)
    layout = operands.layout
    dA, dB = A.new_empty(A.shape), B.new_empty(B.shape)
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    x = x if x.stride(1) == 1 else x.contiguous()
    strides = dy.stride(0), x.stride(0)
    pointers = {"dy_ptr": dy, "x_ptr": x, "ends_ptr": ends, "db_ptr": dB, **operands.pointers}
    for experts, parts, launch, grid in _launches(layout, bucket(-(-len(dy) // layout.experts)), strides):
        some = dA[experts]
        partial_a = dy.new_zeros((len(some), parts, *some.shape[1:]), dtype=torch.float32)
        launch(grid, {**pointers, "partial_a_ptr": partial_a})
        some.copy_(partial_a.sum(1))
    return dA, dB


@cached
def _launches(
    layout: Layout, tokens: int, strides: tuple[int, int]
) -> tuple[tuple[slice, int, Launch, Grid], ...]:
    """The launches; each takes as many experts as keep their partial results of dA below an eighth of W0's memory.

    Each comes with its experts, the largest number of partial results of an expert, and its grid.
    """
    N, experts = layout.features[0], layout.experts
    kernel = GROUPED_GRAD if layout.granule > 1 else GROUPED_GRAD_GATHERED
    config = layout.choose(kernel, tokens=tokens, granule=layout.granule, transposed=layout.transposed)
    tiles_n = tiles_of_segments(N, layout.num_blocks, config.block_n)
    parts = -(-N // config.block_n)  # as if one block had all rows: the host does not know the blocks' sizes
    # Partial results are float32, of rank ρ, for each part; W0 has N rows.
    at_once = max(1, experts * N * layout.dtype.itemsize // (8 * 4 * parts * layout.rank))

    launches = []
    for first in range(0, experts, at_once):
        launch = Launch(
            grouped_grad_kernel,
            config,
            layout,
            first_expert=first,
            tiles_n=tiles_n,
            parts=parts,
            stride_dyp=strides[0],
            stride_xp=strides[1],
            BLOCKS=power_of_two(layout.num_blocks, 16),
            BLOCK_R=RANKS,
        )
        last = min(first + at_once, experts)
        grid = (last - first) * tiles_n, -(-layout.rank // RANKS), 1
        launches.append((slice(first, last), parts, launch, grid))
    return tuple(launches)


def _tile(n: int, c: int, t: int, warps: int, stages: int) -> Config:
    return Config(block_n=n, block_c=c, block_t=t, num_warps=warps, num_stages=stages)


# The largest spills on other architectures, and before Triton 3.9 on sm_80 and sm_100. IEEE float32: NVIDIA has no
# tensor cores for it; with two stages it spills on some architectures, with three on sm_100 and sm_120 by Triton 3.8.
GROUPED_GRAD = Kernel(
    "grouped_grad",
    grouped_grad_kernel,
    rows=(
        Row(AMD, HALF, (_tile(64, 64, 64, 4, 2),)),
        Row(AMD, (), (_tile(64, 64, 32, 4, 2),)),
        Row(GEFORCE_BLACKWELL, ("fp32",), (_tile(16, 32, 32, 4, 3),), before="3.8"),
        Row((*BLACKWELL, *GEFORCE_BLACKWELL), ("fp32",), (_tile(16, 32, 32, 4, 2),), before="3.9"),
        Row((), ("fp32",), (_tile(16, 32, 32, 4, 3),)),
        Row((), ("tf32",), (_tile(64, 64, 32, 8, 3),)),
        Row((), HALF, (_tile(64, 64, 64, 8, 3),), before="3.9"),
        Row((*AMPERE, *HOPPER, *BLACKWELL), HALF, (_tile(128, 64, 64, 8, 3), _tile(64, 64, 64, 8, 3))),
        Row((), HALF, (_tile(64, 64, 64, 8, 3),)),
    ),
    space={
        "block_n": (32, 64, 128),
        "block_c": (32, 64, 128),
        "block_t": (32, 64),
        "num_warps": (4, 8),
        "num_stages": (2, 3),
    },
    fits=lambda config, key: 8 <= config.block_n * config.block_c // (32 * config.num_warps) <= 32,
    # Every tile of rows reads x, every tile of columns dY; dA is written for each tile of rows.
    traffic=lambda config, key: (
        2 * key.tokens * key.in_features * -(-key.out_features // config.block_n)
        + 2 * key.tokens * key.out_features * -(-key.in_features // config.block_c)
        + 8 * key.rank * key.in_features * -(-key.out_features // config.block_n)
    ),
)
GROUPED_GRAD_GATHERED = replace(
    GROUPED_GRAD,
    name="grouped_grad_gathered",
    rows=(
        Row(BLACKWELL, HALF, (_tile(32, 64, 32, 8, 2),), before="3.9"),
        Row((), HALF, (_tile(64, 64, 32, 8, 2),)),
        Row(AMD, (), (_tile(32, 64, 32, 8, 2),)),
        Row((), ("tf32",), (_tile(32, 64, 32, 8, 2),)),
        Row((), (), (_tile(16, 32, 32, 4, 2),)),
    ),
)
