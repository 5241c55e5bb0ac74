# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""W_eff as a dense matrix (merged forward and dX, merge()), and ΔW as padded blocks (split).

    W_eff[i, j] = W0[i, j] · (1 + s · [b(i) = c(j)] · Σ_t B[i, t] A[t, j])               (N, C)
    ΔW[k, p, q] = s · W0[i, j] · Σ_t B[i, t] A[t, j],  i and j in slots p and q of k      (K, P_n, P_c)

Both read W0 once, compute in float32 and write once. Entries t ≥ ranks[k] of the factors are padding and are ignored.
W_eff is rounded by a threshold for each entry (`definition/thresholds.py`), ΔW to nearest.

Layout of the pointers: w (N, C), a (ρ, C), b (N, ρ) and the dense out (N, C) with any strides; row_block (N) and
col_block (C) labels, uint8 or int32; row_index (N), col_index (C) int64, row_offsets, col_offsets (K + 1) int32;
ranks (K) int32; scaling one element; the blocks' out (K, P_n, P_c) contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..definition.packed import PackedAdapter
from ..definition.thresholds import LACKS, Place
from .common import block_slots, hide_origin, load_block, power_of_two, rank_product, round_to
from .launch import Grid, Launch, Layout, Operands, operands_of
from .spec import Config, Kernel, Row
from .table import cached

MOST_RANKS = 32  # that are multiplied at a time; `tl.dot` takes no fewer than 16


@triton.jit
def store_tile(out_ptr, offsets, tile, inside):
    """Round a tile and store it. The shape with an extra dimension gives the store its own layout.

    Otherwise AMD's compiler stores a product in the layout that the matrix cores leave, 64 bits of half types a thread.
    """
    tile = tl.reshape(round_to(tile, out_ptr.dtype.element_ty), (tile.shape[0], 1, tile.shape[1]))
    tl.store(out_ptr + offsets[:, None, :], tile, mask=inside[:, None, :])


@triton.jit
def round_by_place(value, rows, cols, place_first, place_row_step, place_col_step, LACKS: tl.constexpr):
    """Cut off LACKS bits of float32 values, after adding the thresholds of their places. NaN and Inf stay.

    A sum in int32 wraps round, which does not change the lower 16 bits.
    """
    if LACKS > 0:
        places = rows.to(tl.int32)[:, None] * place_row_step + cols.to(tl.int32)[None, :] * place_col_step
        threshold = ((places + place_first) & 0xFFFF) >> (16 - LACKS)
        bits = (value.to(tl.int32, bitcast=True) + threshold) >> LACKS << LACKS
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value


@triton.jit(do_not_specialize=["place_first", "place_row_step", "place_col_step"])
def modulated_weight_kernel(
    w_ptr, a_ptr, b_ptr, row_block_ptr, col_block_ptr, ranks_ptr, scaling_ptr, out_ptr,
    N, C, rank,
    stride_wn, stride_wc, stride_ar, stride_ac, stride_bn, stride_br, stride_on, stride_oc,
    place_first, place_row_step, place_col_step,
    INPUT_PRECISION: tl.constexpr, LACKS: tl.constexpr, RANK_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    tiles_c = tl.cdiv(C, BLOCK_C)
    rows = (tile // tiles_c).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = (tile % tiles_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_inside = rows < N
    col_inside = cols < C
    inside = row_inside[:, None] & col_inside[None, :]
    w = tl.load(w_ptr + rows[:, None] * stride_wn + cols[None, :] * stride_wc, mask=inside, other=0.0)

    row_block = tl.load(row_block_ptr + rows, mask=row_inside, other=0).to(tl.int32)
    col_block = tl.load(col_block_ptr + cols, mask=col_inside, other=0).to(tl.int32)
    product = rank_product(
        a_ptr,
        b_ptr,
        rows,
        cols,
        row_inside,
        col_inside,
        tl.load(ranks_ptr + row_block, mask=row_inside, other=0),
        tl.load(ranks_ptr + col_block, mask=col_inside, other=0),
        rank,
        stride_ar,
        stride_ac,
        stride_bn,
        stride_br,
        INPUT_PRECISION,
        RANK_BLOCK,
    )
    scaling = tl.load(scaling_ptr).to(tl.float32)
    modulation = tl.where(row_block[:, None] == col_block[None, :], scaling * product, 0.0)
    w = w.to(tl.float32)
    # w * (1 + modulation) would round once more, and Inf · 0 is NaN.
    out = tl.where(modulation == 0.0, w, w + w * modulation)
    out = round_by_place(out, rows, cols, place_first, place_row_step, place_col_step, LACKS)
    store_tile(out_ptr, rows[:, None] * stride_on + cols[None, :] * stride_oc, out, inside)


def modulated_weight(
    adapter: PackedAdapter, operands: Operands | None = None, *, ieee: bool = False
) -> Tensor:
    """W_eff (N, C) in W0's dtype and memory order.

    It is rounded by thresholds to a half type, or to TF32 where torch multiplies in it.

    Args:
        adapter: weight and factors on one device, ranks and scaling too.
        operands: the adapter's, where the caller has them.
        ieee: compute a float32 W_eff in IEEE, even if torch multiplies in TF32. Under a half weight float32 factors are
            rounded to TF32, which is as fine as float16 and eight times finer than bfloat16.
    """
    # The tile's last dimension is W0's contiguous dimension.
    if adapter.weight.stride(0) < adapter.weight.stride(1):
        return modulated_weight(adapter.T, ieee=ieee).T
    out = adapter.weight.new_empty(*adapter.weight.shape)
    if out.numel() == 0:
        return out
    operands = operands or operands_of(adapter)
    launch, grid = operands.get(_weight_launch, out.stride(), adapter.place, ieee)
    launch(grid, {"out_ptr": out})
    return out


@cached
def _weight_launch(
    layout: Layout, out_stride: Sequence[int], place: Place, ieee: bool
) -> tuple[Launch, Grid]:
    if ieee and layout.precision == "tf32":
        layout = layout._replace(precision="fp32")
    N, C = layout.features
    config = layout.choose(MODULATED_WEIGHT)
    launch = Launch(
        modulated_weight_kernel,
        config,
        layout,
        stride_on=out_stride[0],
        stride_oc=out_stride[1],
        **{f"place_{name}": value for name, value in place._asdict().items()},
        LACKS=0 if layout.precision == "fp32" else LACKS.get(layout.dtype, LACKS[torch.float16]),
        RANK_BLOCK=min(MOST_RANKS, power_of_two(layout.rank, 16)),
    )
    return launch, (-(-N // config.block_n) * -(-C // config.block_c), 1, 1)


@triton.jit
def modulated_blocks_kernel(
    w_ptr, a_ptr, b_ptr, row_index_ptr, col_index_ptr, row_offsets_ptr, col_offsets_ptr, ranks_ptr,
    scaling_ptr, out_ptr,
    rank, padded_rows, padded_cols,
    stride_wn, stride_wc, stride_ar, stride_ac, stride_bn, stride_br,
    GRANULE: tl.constexpr, INPUT_PRECISION: tl.constexpr, RANK_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    tiles_n = tl.cdiv(padded_rows, BLOCK_N)
    tiles_c = tl.cdiv(padded_cols, BLOCK_C)
    block = tile // (tiles_n * tiles_c)
    row_slots = tile // tiles_c % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    col_slots = tile % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    rows, row_valid = block_slots(row_index_ptr, row_offsets_ptr, block, row_slots, GRANULE)
    cols, col_valid = block_slots(col_index_ptr, col_offsets_ptr, block, col_slots, GRANULE)
    block_rank = tl.minimum(tl.load(ranks_ptr + block), rank)
    row_rank = tl.where(row_valid, block_rank, 0)
    # A block of rank 0 is zero whatever W0 holds, so W0 is not read there.
    # In IEEE float32 the other layout would spill 4 to 16 bytes (Triton 3.6: sm_90 and sm_100, 3.9: sm_100).
    IEEE: tl.constexpr = INPUT_PRECISION == "ieee" and w_ptr.dtype.element_ty == tl.float32
    ADJACENT: tl.constexpr = 8 if IEEE else GRANULE
    w = load_block(w_ptr, rows, cols, row_rank > 0, col_valid, stride_wn, stride_wc, ADJACENT)
    # If 16 divides `rank`, the compiler knows it and reads the rows of B 128 bits at a time.
    ranks_read = block_rank if IEEE else rank
    product = rank_product(
        a_ptr,
        b_ptr,
        rows,
        cols,
        row_valid,
        col_valid,
        row_rank,
        tl.where(col_valid, block_rank, 0),
        ranks_read,
        stride_ar,
        stride_ac,
        stride_bn,
        stride_br,
        INPUT_PRECISION,
        RANK_BLOCK,
    )
    delta = tl.load(scaling_ptr).to(tl.float32) * product * w.to(tl.float32)
    slots = (block.to(tl.int64) * padded_rows + row_slots)[:, None] * padded_cols + col_slots[None, :]
    inside = (row_slots < padded_rows)[:, None] & (col_slots < padded_cols)[None, :]
    if IEEE:
        tl.store(out_ptr + slots, round_to(hide_origin(delta), out_ptr.dtype.element_ty), mask=inside)
    else:
        store_tile(out_ptr, slots, delta, inside)


def modulated_blocks(adapter: PackedAdapter, widths: tuple[int, int]) -> Tensor:
    """ΔW in block order, (K, P_n, P_c) in W0's dtype, zero in padding and in blocks of rank 0.

    Args:
        adapter: weight and factors on one device, ranks and scaling too.
        widths: P_n and P_c, from :func:`block_width`.
    """
    operands = operands_of(adapter)
    out = adapter.weight.new_empty(operands.layout.num_blocks, *widths)
    if out.numel():
        launch, grid = operands.get(_blocks_launch, widths)
        launch(grid, {"out_ptr": out})
    return out


@cached
def _blocks_launch(layout: Layout, widths: tuple[int, int]) -> tuple[Launch, Grid]:
    padded_rows, padded_cols = widths
    config = layout.choose(
        MODULATED_BLOCKS, padded_out=padded_rows, padded_in=padded_cols, granule=layout.granule
    )
    launch = Launch(
        modulated_blocks_kernel,
        config,
        layout,
        padded_rows=padded_rows,
        padded_cols=padded_cols,
        RANK_BLOCK=min(MOST_RANKS, power_of_two(layout.rank, 16)),
    )
    tiles = layout.num_blocks * -(-padded_rows // config.block_n) * -(-padded_cols // config.block_c)
    return launch, (tiles, 1, 1)


def _tile(n: int, c: int, warps: int) -> Config:
    return Config(block_n=n, block_c=c, num_warps=warps)


MODULATED_WEIGHT = Kernel(
    "modulated_weight",
    modulated_weight_kernel,
    rows=(Row((), (), (_tile(64, 64, 4), _tile(16, 128, 4), _tile(32, 128, 8))),),
    space={"block_n": (16, 32, 64, 128), "block_c": (32, 64, 128, 256), "num_warps": (1, 2, 4, 8)},
    fits=lambda config, key: 8 <= config.block_n * config.block_c // (32 * config.num_warps) <= 64,
    # W0 is read and W_eff written once; a tile also reads its rows of B and columns of A.
    traffic=lambda config, key: (
        key.out_features * key.in_features * (4 + 4 * key.rank * (1 / config.block_n + 1 / config.block_c))
    ),
)
MODULATED_BLOCKS = replace(MODULATED_WEIGHT, name="modulated_blocks", fn=modulated_blocks_kernel)
