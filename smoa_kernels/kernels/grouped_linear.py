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

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..definition.experts import ExpertsAdapter
from ..definition.precision import Precision
from .architectures import Architecture
from .common import (
    OLD_TRITON,
    coordinates,
    dot,
    power_of_two,
    round_to,
    segment_of,
    tiles_of_segments,
    to_tf32,
)
from .launch import Launch, Layout, described
from .spec import Config, Kernel, Key, granule_of, on_amd
from .table import remembered

# Ranks that a program takes at a time; more would spill. A tile with more pairs takes fewer.
MOST_RANKS, FEW_RANKS, MOST_PAIRS = 32, 16, 128


@triton.jit
def through_registers(transposed_ptr, mask):
    """Load a tile of a transposed W0. As a function of its own, Triton loads it two steps ahead, into registers."""
    return tl.load(transposed_ptr, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["tiles_t", "tiles_n", "num_experts", "num_blocks", "rank"])
def grouped_linear_kernel(
    x_ptr,
    w_ptr,
    a_ptr,
    b_ptr,
    ends_ptr,
    row_index_ptr,
    col_index_ptr,
    row_offsets_ptr,
    col_offsets_ptr,
    ranks_ptr,
    scaling_ptr,
    out_ptr,
    tiles_t,
    tiles_n,
    num_experts,
    num_blocks,
    N,
    C,
    rank,
    stride_xp,
    stride_we,
    stride_wn,
    stride_wc,
    stride_ae,
    stride_ar,
    stride_ac,
    stride_be,
    stride_bn,
    stride_br,
    stride_row_index,
    stride_col_index,
    stride_row_offsets,
    stride_col_offsets,
    GRANULE: tl.constexpr,
    INDEXED: tl.constexpr,
    ADAPTER: tl.constexpr,
    BASE: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_T: tl.constexpr,
):
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
                # This keeps the values and takes W0 through registers, to keep its copy 16 bytes
                # wide. With the hints of `coordinates` alone it is 4 bytes on sm_90 (Triton 3.6, 3.9) and sm_100 (3.9).
                w = tl.where(row_valid[:, None], w, 0.0)
            acc = dot(w, x, acc, INPUT_PRECISION)

    if LATE:
        out_ptrs = out_ptr + pairs.to(tl.int64)[:, None] * N + rows[None, :]
    tl.store(out_ptrs, round_to(tl.trans(acc), out_ptr.dtype.element_ty), mask=out_mask)


def grouped_linear(
    x: Tensor,
    ends: Tensor,
    adapter: ExpertsAdapter,
) -> Tensor:
    """`y_p = x_p W_effᵀ` (P, N) with the W_eff of pair p's expert, in x's dtype; `adapter.T` makes it dX.

    Args:
        x: (P, C) sorted by expert, in W0's dtype.
        ends: int32 (E,), where the pairs of each expert end; the last is P.
        adapter: of the experts, on x's device.
    """
    layout, pointers = described(adapter)
    y = x.new_empty(x.shape[0], layout.features[0])
    if y.numel() == 0:
        return y
    if layout.features[1] == 0:
        return y.zero_()
    x = x if x.stride(1) == 1 else x.contiguous()
    # Two launches if the adapter's part reads one number at a time.
    together = layout.granule > 1 or layout.num_blocks == 1
    for has_adapter, has_base in ((True, True),) if together else ((True, False), (False, True)):
        launch = _launch(layout, x.shape[0], x.stride(0), has_adapter, has_base)
        launch(x_ptr=x, ends_ptr=ends, out_ptr=y, **pointers)
    return y


@remembered
def _launch(
    layout: Layout,
    pairs: int,
    stride_xp: int,
    adapter: bool,
    base: bool,
) -> Launch:
    N = layout.features[0]
    config = layout.choose(
        "grouped_linear" if base else "grouped_linear_gathered",
        **layout.experts_sizes(pairs),
    )
    tiles_t = tiles_of_segments(pairs, layout.experts, config.block_t)
    blocks = layout.num_blocks if adapter else 1
    tiles_n = tiles_of_segments(N, blocks, config.block_n)
    return Launch(
        grouped_linear_kernel,
        (tiles_t * tiles_n,),
        config,
        layout,
        tiles_t=tiles_t,
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


_FEW = Config(block_t=16, block_n=64, block_c=64, block_d=64, group_t=8, num_warps=4, num_stages=3)
_SHIPPED = (
    Config(block_t=64, block_n=128, block_c=64, block_d=32, group_t=8, num_warps=8, num_stages=3),
    _FEW,
)
# With Triton 3.6, three stages spill 12 bytes for dX on sm_80, and 4 for y on sm_120.
_SHIPPED_OLD = {
    "sm_80": (_SHIPPED[0], replace(_FEW, num_stages=4)),
    "sm_120": (_SHIPPED[0], replace(_FEW, num_stages=2)),
}
_SHIPPED_SM_90 = (
    Config(block_t=256, block_n=128, block_c=32, block_d=16, group_t=8, num_warps=8, num_stages=3),
    Config(block_t=128, block_n=128, block_c=64, block_d=32, group_t=8, num_warps=8, num_stages=3),
    Config(block_t=64, block_n=128, block_c=64, block_d=64, group_t=8, num_warps=8, num_stages=3),
    _FEW,
)
_SHIPPED_TF32 = (
    Config(block_t=64, block_n=64, block_c=32, block_d=32, group_t=8, num_warps=8, num_stages=3),
)
# IEEE float32: NVIDIA has no tensor cores for it, and a thread holds the whole depth of its operands in registers.
_SHIPPED_IEEE = (
    Config(block_t=32, block_n=64, block_c=16, block_d=16, group_t=8, num_warps=4, num_stages=3),
)
# Shorter steps where operands are read one number at a time: each address takes registers.
_GATHERED = (Config(block_t=16, block_n=64, block_c=64, block_d=16, group_t=8, num_warps=4, num_stages=3),)
# With Triton 3.6, the one above spills 4 to 16 bytes on sm_80 to sm_89 and sm_120. Of nine tried, only this does not.
_GATHERED_OLD = (replace(_GATHERED[0], block_n=32, block_d=32),)
_GATHERED_TF32 = (
    Config(block_t=64, block_n=64, block_c=32, block_d=16, group_t=8, num_warps=8, num_stages=3),
)
_GATHERED_IEEE = (
    Config(block_t=16, block_n=32, block_c=16, block_d=16, group_t=8, num_warps=4, num_stages=2),
)


def _shipped(arch: Architecture, precision: Precision) -> tuple[Config, ...]:
    if arch.is_amd:
        return on_amd(_SHIPPED)
    if precision.dtype == torch.float32:
        if precision.ieee:
            spills = OLD_TRITON and arch.name != "sm_100"  # 12 to 16 bytes
            return (replace(_SHIPPED_IEEE[0], block_n=32),) if spills else _SHIPPED_IEEE
        if OLD_TRITON and arch.name == "sm_100":
            return (replace(_SHIPPED_TF32[0], block_t=32, num_warps=4),)
        spills = not arch.has_wide_tensor_cores if OLD_TRITON else arch.name == "sm_100"  # 12 bytes
        return _GATHERED_TF32 if spills else _SHIPPED_TF32
    if arch.name == "sm_90":
        return _SHIPPED_SM_90[1:] if OLD_TRITON else _SHIPPED_SM_90  # it spills the widest
    return _SHIPPED_OLD.get(arch.name, _SHIPPED) if OLD_TRITON else _SHIPPED


def _gathered(arch: Architecture, precision: Precision) -> tuple[Config, ...]:
    if arch.is_amd:
        return on_amd(_GATHERED)
    if precision.dtype == torch.float32:
        if precision.ieee:
            spills = OLD_TRITON and arch.name in ("sm_86", "sm_89")  # 12 bytes
            return (replace(_GATHERED_IEEE[0], block_n=16),) if spills else _GATHERED_IEEE
        spills = arch.name == "sm_100" and not OLD_TRITON  # 76 bytes
        return _SHIPPED_TF32 if spills else _GATHERED_TF32
    if arch.name == "sm_100":  # with four warps its registers spill
        return (replace(_GATHERED[0], num_warps=8),)
    return _GATHERED_OLD if OLD_TRITON and not arch.has_wide_tensor_cores else _GATHERED


def _choose(shipped: Sequence[Config], key: Key, multiprocessors: int) -> Config:
    """Choose the widest tile of which an expert has two on average: its last tile is half empty.

    A tile of 256 pairs takes 16 ranks at a time and reads x again for the next 16. It needs base and adapter in one
    launch.
    """
    if key.rank > FEW_RANKS or key.granule == 1:
        shipped = [config for config in shipped if config.block_t <= MOST_PAIRS]
    return next((config for config in shipped if 2 * config.block_t <= key.tokens), shipped[-1])


GROUPED_LINEAR = Kernel(
    "grouped_linear",
    grouped_linear_kernel,
    shipped=_shipped,
    choose=_choose,
)
GROUPED_LINEAR_GATHERED = replace(
    GROUPED_LINEAR,
    name="grouped_linear_gathered",
    shipped=_gathered,
)
