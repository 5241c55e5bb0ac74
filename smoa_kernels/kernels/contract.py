# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""dA and dB, the gradients of the factors, from `G_k = dY_kᵀ X_k` of every block, in one pass over G and W0.

    H_k = s · G_k ∘ W0_k,   dB_k = H_k · A_kᵀ,   dA_k = B_kᵀ · H_k

One program reads a tile of G_k and of W0's block, and contracts H with the tile's rows of B and columns of A. It writes
only these small partial results. `sum_partials.py` adds them in a fixed order, without atomics, so two runs agree bit
for bit. H stays float32: it is summed once more, over the width of the block.

Layout of the pointers: g (K, P_n, P_c) float32, contiguous; weight (N, C), a (ρ, C), b (N, ρ) in the layer's own
coordinates, any strides, read through row_index (N), col_index (C) int64 and row_offsets, col_offsets (K + 1) int32;
ranks (K) int32; scaling one element; partial_b (column tiles, N, R) and partial_a (row tiles, C, R) float32,
contiguous. R is ρ rounded up to a group of ranks: a row of partials is a multiple of 128 bits, one store.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..definition.packed import PackedAdapter
from .architectures import ADA, AMD, AMPERE, GEFORCE_BLACKWELL, HOPPER
from .common import block_slots, dot, load_block, power_of_two, to_tf32
from .launch import Grid, Launch, Layout, Operands, operands_of
from .spec import PARTIAL_RANKS, Config, Kernel, Row, partial_width
from .sum_partials import sum_partials
from .table import cached

# Ranks of a group: 128 bits of float32. The kernel gets the number of groups, so the compiler knows the alignment.
GROUP = tl.constexpr(PARTIAL_RANKS)
MOST_RANKS = 32  # of a program; further ranks take further programs, which read G and W0 anew


@triton.jit(do_not_specialize=["rank", "rank_groups"])
def contract_kernel(
    g_ptr, w_ptr, a_ptr, b_ptr, scaling_ptr, ranks_ptr, row_index_ptr, col_index_ptr, row_offsets_ptr,
    col_offsets_ptr, partial_a_ptr, partial_b_ptr,
    N, C, padded_rows, padded_cols, rank, rank_groups,
    stride_wn, stride_wc, stride_ar, stride_ac, stride_bn, stride_br,
    GRANULE: tl.constexpr, INPUT_PRECISION: tl.constexpr, EXACT: tl.constexpr, RANK_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles_n, tiles_c = tl.cdiv(padded_rows, BLOCK_N), tl.cdiv(padded_cols, BLOCK_C)
    tile_c = tl.program_id(0) % tiles_c
    tile_n = tl.program_id(0) // tiles_c % tiles_n
    block = (tl.program_id(0) // tiles_c // tiles_n).to(tl.int64)
    # Ranks beyond the block's get zeros, whatever G, W0 and the factors' padding hold.
    t = tl.program_id(1) * RANK_BLOCK + tl.arange(0, RANK_BLOCK)
    below = (t < tl.minimum(tl.load(ranks_ptr + block), rank))[None, :]
    width = rank_groups * GROUP
    stored = (t < width)[None, :]
    scaling = tl.load(scaling_ptr).to(tl.float32)

    row_slots = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, row_valid = block_slots(row_index_ptr, row_offsets_ptr, block, row_slots, GRANULE)
    b_ptrs = b_ptr + rows[:, None] * stride_bn + t[None, :] * stride_br
    b = tl.load(b_ptrs, mask=row_valid[:, None] & below, other=0.0).to(tl.float32)
    g_rows = g_ptr + (block * padded_rows + row_slots)[:, None] * padded_cols
    g_inside = (row_slots < padded_rows)[:, None]
    db = tl.zeros((BLOCK_N, RANK_BLOCK), tl.float32)
    for first in tl.range(tile_c * BLOCK_C, (tile_c + 1) * BLOCK_C, BLOCK_D, num_stages=1):
        col_slots = first + tl.arange(0, BLOCK_D)
        cols, col_valid = block_slots(col_index_ptr, col_offsets_ptr, block, col_slots, GRANULE)
        g = tl.load(
            g_rows + col_slots[None, :], mask=g_inside & (col_slots < padded_cols)[None, :], other=0.0
        )
        w = load_block(w_ptr, rows, cols, row_valid, col_valid, stride_wn, stride_wc, GRANULE)
        h = scaling * g * w.to(tl.float32)
        h = tl.where(row_valid[:, None] & col_valid[None, :], h, 0.0)  # in G's padding 0 · NaN is NaN
        h = to_tf32(h, INPUT_PRECISION)
        a_ptrs = a_ptr + cols[:, None] * stride_ac + t[None, :] * stride_ar
        a = tl.load(a_ptrs, mask=col_valid[:, None] & below, other=0.0).to(tl.float32)
        db = dot_factor(h, a, db, EXACT, INPUT_PRECISION)
        da = tl.zeros((BLOCK_D, RANK_BLOCK), tl.float32)
        da = dot_factor(tl.trans(h), b, da, EXACT, INPUT_PRECISION)
        da_ptrs = partial_a_ptr + (tile_n.to(tl.int64) * C + cols)[:, None] * width + t[None, :]
        tl.store(da_ptrs, tl.where(below, da, 0.0), mask=col_valid[:, None] & stored)
    db_ptrs = partial_b_ptr + (tile_c.to(tl.int64) * N + rows)[:, None] * width + t[None, :]
    tl.store(db_ptrs, tl.where(below, db, 0.0), mask=row_valid[:, None] & stored)


@triton.jit
def dot_factor(h, factor, acc, EXACT: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """acc + h · factor; EXACT: of a TF32 product, whose factor then keeps 21 bits."""
    high = to_tf32(factor, INPUT_PRECISION)
    if EXACT:
        acc = dot(h, to_tf32(factor - high, INPUT_PRECISION), acc, INPUT_PRECISION)
    return dot(h, high, acc, INPUT_PRECISION)


def contract(G: Tensor, adapter: PackedAdapter, operands: Operands | None = None) -> tuple[Tensor, Tensor]:
    """dA (ρ, C) and dB (N, ρ) of all blocks, in the factors' dtypes; rows and columns t ≥ r_k are exactly 0.

    Args:
        G: `dY_kᵀ X_k` of every block (K, P_n, P_c), float32, contiguous, in the order of the partition's index.
        adapter: weight, factors, partition, ranks and scaling.
        operands: the adapter's, where the caller has them.
    """
    A, B = adapter.A, adapter.B
    dA, dB = A.new_empty(*A.shape), B.new_empty(*B.shape)  # torch parses numbers faster than a size
    if dA.numel() == 0 or dB.numel() == 0:
        return dA, dB
    _, padded_rows, padded_cols = G.shape
    operands = operands or operands_of(adapter)
    launch, grid, of_a, of_b = operands.get(_launch, padded_rows, padded_cols)
    partial_a, partial_b = G.new_empty(*of_a), G.new_empty(*of_b)
    launch(grid, {"g_ptr": G, "partial_a_ptr": partial_a, "partial_b_ptr": partial_b})
    sum_partials(partial_a, dA, transposed=True)
    sum_partials(partial_b, dB)
    return dA, dB


@cached
def _launch(
    layout: Layout, padded_rows: int, padded_cols: int
) -> tuple[Launch, Grid, tuple[int, int, int], tuple[int, int, int]]:
    """The launch, its grid, and the shapes of its partials of dA and of dB."""
    config = layout.choose(CONTRACT, padded_out=padded_rows, padded_in=padded_cols, granule=layout.granule)
    tiles_n, tiles_c = -(-padded_rows // config.block_n), -(-padded_cols // config.block_c)
    width, (N, C) = partial_width(layout.rank), layout.features
    ranks = min(MOST_RANKS, power_of_two(layout.rank, 16))  # `tl.dot` takes no fewer than 16
    launch = Launch(
        contract_kernel,
        config,
        layout,
        padded_rows=padded_rows,
        padded_cols=padded_cols,
        rank_groups=width // PARTIAL_RANKS,
        RANK_BLOCK=ranks,
        # TF32 is no finer than float16. Under a float16 weight, rounding float32 factors to it put single elements of
        # dA and dB over their error budget. Half factors are exact in TF32.
        EXACT=layout.input_precision == "tf32" and layout.dtype != torch.float32 and layout.factors == "fp32",
    )
    grid = layout.num_blocks * tiles_n * tiles_c, -(-layout.rank // ranks), 1
    return launch, grid, (tiles_n, C, width), (tiles_c, N, width)


def _tile(n: int, c: int, warps: int = 4) -> Config:
    return Config(block_n=n, block_c=c, block_d=32, num_warps=warps)


# 64 × 128 spills 12 bytes on sm_80 (32 ranks of float32 factors) and 8 on sm_120 in TF32, 32 × 128 4 elsewhere. IEEE
# float32: NVIDIA has no tensor cores for it, and a thread holds the whole depth of its operands in registers. For 32
# rows Triton 3.8 allots too few of them on sm_86 and sm_90, and spills 4 bytes.
CONTRACT = Kernel(
    "contract",
    contract_kernel,
    rows=(
        Row(AMD, (), (_tile(64, 128, 2), _tile(32, 128, 2))),
        Row(ADA, ("fp32",), (_tile(32, 128), _tile(32, 64)), before="3.8"),
        Row((*HOPPER, *ADA), ("fp32",), (_tile(64, 128),), before="3.9"),
        Row((), ("fp32",), (_tile(32, 128), _tile(32, 64))),
        Row(AMPERE, (), (_tile(32, 128),)),
        Row(GEFORCE_BLACKWELL, ("tf32",), (_tile(32, 128),)),
        Row((), (), (_tile(64, 128),)),
    ),
    space={
        "block_n": (32, 64, 128),
        "block_c": (64, 128, 256),
        "block_d": (16, 32, 64),
        "num_warps": (2, 4, 8),
    },
    fits=lambda config, key: 16 <= config.block_n * config.block_d // (32 * config.num_warps) <= 32,
    # G once, W0 once, and partials of dA and dB, written and read.
    traffic=lambda config, key: (
        key.out_features * key.in_features * (4 / key.blocks + 2)
        + 8 * key.rank * (key.out_features * key.padded_in / config.block_c)
        + 8 * key.rank * (key.in_features * key.padded_out / config.block_n)
    ),
)
