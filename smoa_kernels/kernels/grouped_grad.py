# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""dB of all experts in one launch; with x and dY swapped and W0 transposed, dA.

    G = dY_eᵀ · X_e,   H = s · G ∘ W0_e,   dB_e[rows_k] = H[rows_k, cols_k] · A_e[:, cols_k]ᵀ

over the pairs of each expert e and its blocks k. A program owns some rows of one block. It goes over that block's
columns, makes one tile of G after another in registers, multiplies it by W0's and contracts it with A's. It writes each
row of dB once: no partial results, no atomics, and two runs agree bit for bit. An expert without pairs gets zeros.

dA_eᵀ is the same of W_effᵀ, so G is computed twice, once for each factor. One pass for both, as in `block_grad.py`,
would save 1/K of a base product. It would take partial results in memory, their sum, and H transposed.

Layout of the pointers: dy (P, N), x (P, C), a (E, ρ, C), last stride 1; weight (E, N, C), out (E, N, ρ), any strides;
ends, indices, offsets, ranks and scaling as in `grouped_linear.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cost.architectures import Architecture
from ..definition.experts import ExpertsAdapter, reference_experts_linear
from ..definition.precision import Precision
from .common import dot, input_precision, round_to, to_tf32
from .grouped import (
    MOST_RANKS,
    ExpertsLayout,
    along_columns,
    coordinates,
    experts_operands,
    power_of_two,
    segment_of,
    tiles_of_segments,
)
from .launch import Launcher, Plan
from .spec import INDEX, Config, Kernel, Operands, Work, in_dtype
from .table import remembered, select

__all__ = ["GROUPED_GRAD", "GROUPED_GRAD_GATHERED", "GroupedGradConfig", "grouped_grad"]


@dataclass(frozen=True)
class GroupedGradConfig(Config):
    """`block_n` rows of dB per program, which makes one tile of G after another."""

    block_n: int
    block_c: int
    block_t: int
    num_warps: int
    num_stages: int


@triton.jit(do_not_specialize=["tiles_n", "num_blocks", "rank"])
def grouped_grad_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    a_ptr,
    ends_ptr,
    row_index_ptr,
    col_index_ptr,
    row_offsets_ptr,
    col_offsets_ptr,
    ranks_ptr,
    scaling_ptr,
    out_ptr,
    tiles_n,
    num_blocks,
    rank,
    stride_dyp,
    stride_xp,
    stride_we,
    stride_wn,
    stride_wc,
    stride_ae,
    stride_ar,
    stride_ac,
    stride_oe,
    stride_on,
    stride_or,
    stride_row_offsets,
    stride_col_offsets,
    stride_row_index,
    stride_col_index,
    GRANULE: tl.constexpr,
    INDEXED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    number = tl.program_id(0) // tiles_n
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
    # Nothing to sum over: not even a NaN of W0 reaches the gradient.
    some = (pair_start < pair_end) & (tl.program_id(1) * BLOCK_R < block_rank)
    col_end = tl.where(some, col_end, col_start)

    weight_ptr += expert * stride_we
    a_ptr += expert * stride_ae
    slots_t = tl.arange(0, BLOCK_T)
    db = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for col in range(col_start, col_end, BLOCK_C):
        cols, col_valid = coordinates(col_index_of, col, col_end, GRANULE, INDEXED, BLOCK_C)
        # Before the sum over pairs, which takes as long as this load.
        w_offsets = rows[:, None] * stride_wn + cols[None, :] * stride_wc
        w_mask = row_valid[:, None] & col_valid[None, :]
        weight = tl.load(weight_ptr + w_offsets, mask=w_mask, other=0.0)
        grad = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        for pair in range(pair_start, pair_end, BLOCK_T):
            pair_valid = slots_t < pair_end - pair
            pairs = (pair + slots_t).to(tl.int64)
            dy_ptrs = dy_ptr + pairs[None, :] * stride_dyp + rows[:, None]
            dy = tl.load(dy_ptrs, mask=pair_valid[None, :] & row_valid[:, None], other=0.0)
            x_ptrs = x_ptr + pairs[:, None] * stride_xp + cols[None, :]
            x = tl.load(x_ptrs, mask=pair_valid[:, None] & col_valid[None, :], other=0.0)
            if x.dtype == tl.float32 and INPUT_PRECISION == "tf32":
                # Changes nothing: takes the tiles to their product through registers, as in block_grad.
                dy = tl.where(pair_valid[None, :], dy, 0.0)
                x = tl.where(pair_valid[:, None], x, 0.0)
            grad = dot(dy, x, grad, INPUT_PRECISION)
        a_ptrs = a_ptr + cols[:, None] * stride_ac + t[None, :] * stride_ar
        a = tl.load(a_ptrs, mask=col_valid[:, None] & (t < block_rank)[None, :], other=0.0)
        h = to_tf32(grad * weight.to(tl.float32), INPUT_PRECISION)
        db = dot(h, to_tf32(a.to(tl.float32), INPUT_PRECISION), db, INPUT_PRECISION)

    db *= tl.load(scaling_ptr).to(tl.float32)
    out_ptrs = out_ptr + expert * stride_oe + rows[:, None] * stride_on + t[None, :] * stride_or
    mask = row_valid[:, None] & (t < rank)[None, :]
    tl.store(out_ptrs, round_to(db, out_ptr.dtype.element_ty), mask=mask)


launch_grouped_grad = Launcher(grouped_grad_kernel)


def grouped_grad(
    dy: Tensor,
    x: Tensor,
    ends: Tensor,
    adapter: ExpertsAdapter,
    out: Tensor,
    *,
    allow_tf32: bool = False,
    config: GroupedGradConfig | None = None,
) -> None:
    """Write dB (E, N, ρ) to `out`, rows t ≥ r_k as zeros; with x and dY swapped and `adapter.T`, dAᵀ (E, C, ρ).

    Args:
        dy: (P, N) sorted by expert, in W0's dtype.
        x: (P, C), likewise.
        ends: int32 (E,), where the pairs of each expert end; the last is P.
        adapter: of the experts, on x's device.
        out: (E, N, ρ), any strides.
        allow_tf32: let float32 products round their operands to TF32. Under a half weight the contraction always may.
        config: launch parameters.
    """
    if out.numel() == 0:
        return
    adapter = along_columns(adapter)
    blocks, layout = adapter.blocks, ExpertsLayout.of(adapter)
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    x = x if x.stride(1) == 1 else x.contiguous()
    plan = _plan(layout, dy.shape[0], (dy.stride(0), x.stride(0)), out.stride(), allow_tf32, config)
    launch_grouped_grad(
        plan,
        dy_ptr=dy,
        x_ptr=x,
        weight_ptr=adapter.weight,
        a_ptr=adapter.A,
        ends_ptr=ends,
        row_index_ptr=blocks.row_index,
        col_index_ptr=blocks.col_index,
        row_offsets_ptr=blocks.row_offsets,
        col_offsets_ptr=blocks.col_offsets,
        ranks_ptr=adapter.ranks,
        scaling_ptr=adapter.scaling,
        out_ptr=out,
    )


@remembered
def _plan(
    layout: ExpertsLayout,
    pairs: int,
    strides: tuple[int, int],
    out_stride: Sequence[int],
    allow_tf32: bool,
    config: GroupedGradConfig | None,
) -> Plan:
    experts, out_features, _ = layout.shape
    precision = input_precision(layout.dtype, allow_tf32=allow_tf32)
    transposed = layout.weight[2] != 1
    config = config or select(
        "grouped_grad" if layout.granule > 1 else "grouped_grad_gathered",
        layout.device,
        layout.dtype,
        precision,
        transposed=transposed,
        **layout.sizes(pairs),
    )
    tiles_n = tiles_of_segments(out_features, layout.num_blocks, config.block_n)
    block_r = min(MOST_RANKS, power_of_two(layout.rank))
    return Plan(
        (experts * tiles_n, -(-layout.rank // block_r)),
        config,
        tiles_n=tiles_n,
        num_blocks=layout.num_blocks,
        rank=layout.rank,
        stride_dyp=strides[0],
        stride_xp=strides[1],
        stride_we=layout.weight[0],
        stride_wn=layout.weight[1],
        stride_wc=layout.weight[2],
        stride_ae=layout.A[0],
        stride_ar=layout.A[1],
        stride_ac=layout.A[2],
        stride_oe=out_stride[0],
        stride_on=out_stride[1],
        stride_or=out_stride[2],
        stride_row_offsets=layout.offsets[0],
        stride_col_offsets=layout.offsets[1],
        stride_row_index=layout.indices[0],
        stride_col_index=layout.indices[1],
        GRANULE=layout.granule,
        INDEXED=layout.indexed,
        INPUT_PRECISION=precision,
        BLOCKS=power_of_two(layout.num_blocks),
        BLOCK_N=config.block_n,
        BLOCK_C=config.block_c,
        BLOCK_T=config.block_t,
        BLOCK_R=block_r,
    )


_SHIPPED = (
    GroupedGradConfig(64, 128, 64, num_warps=8, num_stages=3),
    GroupedGradConfig(64, 64, 64, num_warps=4, num_stages=3),
)
_SHIPPED_SM_90 = (GroupedGradConfig(128, 128, 64, num_warps=8, num_stages=3), _SHIPPED[1])
_SHIPPED_TF32 = (GroupedGradConfig(64, 64, 32, num_warps=8, num_stages=2),)
# IEEE float32 without tensor cores: on NVIDIA.
_SHIPPED_IEEE = (GroupedGradConfig(16, 32, 32, num_warps=4, num_stages=2),)
_GATHERED_TF32 = (GroupedGradConfig(32, 64, 32, num_warps=8, num_stages=2),)


def _shipped(arch: Architecture, precision: Precision) -> tuple[GroupedGradConfig, ...]:
    if precision.ieee and not arch.is_amd:
        return _SHIPPED_IEEE
    if precision.dtype == torch.float32:
        return _SHIPPED_TF32
    if arch.name == "sm_90":
        return _SHIPPED_SM_90
    return _SHIPPED[1:] if arch.is_amd else _SHIPPED


def _gathered(arch: Architecture, precision: Precision) -> tuple[GroupedGradConfig, ...]:
    if precision.dtype != torch.float32:
        return _SHIPPED_TF32
    return _SHIPPED_IEEE if precision.ieee and not arch.is_amd else _GATHERED_TF32


def _workload(operands: Operands) -> Work:
    adapter, ends, x, dy = experts_operands(operands)
    out = torch.empty_like(adapter.B)

    def run(config: Any) -> list[Tensor]:
        grouped_grad(dy, x, ends, adapter, out, allow_tf32=operands.allow_tf32, config=config)
        return [out]

    def defined(dtype: torch.dtype) -> list[Tensor]:
        of_dtype = in_dtype(adapter, dtype)
        B = of_dtype.B.clone().requires_grad_()
        with torch.enable_grad():
            reference_experts_linear(x.to(dtype), ends, replace(of_dtype, B=B)).backward(dy.to(dtype))
        assert B.grad is not None
        return [B.grad]

    return run, defined


GROUPED_GRAD = Kernel(
    "grouped_grad",
    grouped_grad_kernel,
    GroupedGradConfig,
    role="matmul",
    shipped=_shipped,
    steps={
        "block_n": (32, 64, 128),
        "block_c": (32, 64, 128, 256),
        "block_t": (16, 32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
    workload=_workload,
    forms=(
        "r16 granules contiguous",
        "r16 granules contiguous transposed",
        "r64 fp32 factors granules contiguous",
        "r16 granules",
    ),
    narrow={
        "index_ptr": INDEX,  # as coordinates names them
        "weight_ptr": "one tile for a whole sum over pairs, in registers",
        "a_ptr": "one tile for a whole sum over pairs, as wide as the rank",
    },
)
GROUPED_GRAD_GATHERED = replace(
    GROUPED_GRAD,
    name="grouped_grad_gathered",
    role="gather",
    shipped=_gathered,
    forms=("r16", "r16 transposed", "r64 fp32 factors"),
    narrow={},
)
