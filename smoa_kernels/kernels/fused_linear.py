# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Base and adapter in one pass over W0, for few tokens; with W0's strides swapped, dX.

    y[t, i] = Σ_j x[t, j] · W0[i, j]  +  Σ_j x[t, j] · ΔW[i, j]  +  bias[i]                      (T, N)
    ΔW[i, j] = s · [b(i) = c(j)] · W0[i, j] · Σ_r B[i, r] A[r, j], made in registers, never in memory

Two float32 sums, rounded once together: a ΔW added to W0 before the product would be lost in W0's rounding, and an
adapter's output added to a rounded y in y's (docs/numerics.md). W0 is the left operand of the products: yᵀ = W0 xᵀ
puts N, not the few tokens, on the tensor cores' long side, and ΔW goes into its product from registers.

Where y has few tiles, `split` programs share the sum over C; a rank too large for one product is cut into chunks,
each a program of its own. The parts are float32 sums that a second small kernel adds in order: no atomics.

Layout of the pointers: x (T, C), w (N, C), a (ρ, C), b (N, ρ) with any strides; bias (N) contiguous; row_block (N)
and col_block (C) labels, uint8 or int32; ranks (K) int32; scaling one element; out contiguous, y (T, N) in x's
dtype or the parts (chunks · split, T, N) in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..definition.packed import PackedAdapter
from .common import dot, input_precision, round_to
from .launch import FusedLinearConfig, SumConfig
from .table import select

__all__ = ["fused_linear"]


@triton.jit
def widened(labels):
    # A reduction over one element. Without it Ampere's compiler sees that ΔW depends on a byte, lays its product out
    # as for byte operands, finds that x would be read in two layouts, and no longer copies x asynchronously.
    return tl.max(labels.to(tl.int32)[None, :], axis=0)


@triton.jit(do_not_specialize=["T"])
def fused_linear_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    a_ptr,
    b_ptr,
    row_block_ptr,
    col_block_ptr,
    ranks_ptr,
    scaling_ptr,
    out_ptr,
    T,
    N,
    C,
    rank,
    stride_xt,
    stride_xc,
    stride_wn,
    stride_wc,
    stride_ar,
    stride_ac,
    stride_bn,
    stride_br,
    INPUT_PRECISION: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tile = tl.program_id(0)
    chunk = tl.program_id(1)
    tiles_t = tl.cdiv(T, BLOCK_T)
    part = tile % SPLIT
    tokens = (tile // SPLIT % tiles_t).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = (tile // SPLIT // tiles_t).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token_inside = tokens < T
    row_inside = rows < N
    row_block = widened(tl.load(row_block_ptr + rows, mask=row_inside, other=0))
    row_rank = tl.minimum(tl.load(ranks_ptr + row_block, mask=row_inside, other=0), rank)
    scaling = tl.load(scaling_ptr).to(tl.float32)
    r = chunk * RANK_BLOCK + tl.arange(0, RANK_BLOCK)

    base = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    adapted = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    # At least one step, and known to be: accumulators that a skipped loop would set by hand keep ptxas from running
    # wgmma asynchronously. Columns past C are masked.
    steps = tl.maximum(tl.cdiv(tl.cdiv(C, BLOCK_C), SPLIT), 1)
    tl.assume(steps > 0)
    for step in range(steps):
        cols = (part * steps + step) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
        col_inside = cols < C
        w_ptrs = w_ptr + rows[:, None] * stride_wn + cols[None, :] * stride_wc
        w = tl.load(w_ptrs, mask=row_inside[:, None] & col_inside[None, :], other=0.0)
        x_ptrs = x_ptr + tokens[None, :] * stride_xt + cols[:, None] * stride_xc
        x = tl.load(x_ptrs, mask=token_inside[None, :] & col_inside[:, None], other=0.0)
        col_block = widened(tl.load(col_block_ptr + cols, mask=col_inside, other=0))
        if W_TRANSPOSED or w.dtype == tl.float32:
            # Changes nothing, but takes W0 to its products through registers. As TF32 or transposed, most tensor cores
            # cannot read it where an asynchronous copy of whole 128-bit words leaves it, and the copy would suffer.
            w = tl.where(row_inside[:, None], w, 0.0)

        a_ptrs = a_ptr + r[:, None] * stride_ar + cols[None, :] * stride_ac
        a = tl.load(a_ptrs, mask=(r < rank)[:, None] & col_inside[None, :], other=0.0)
        b_ptrs = b_ptr + rows[:, None] * stride_bn + r[None, :] * stride_br
        b = tl.load(b_ptrs, mask=row_inside[:, None] & (r < rank)[None, :], other=0.0)
        col_rank = tl.load(ranks_ptr + col_block, mask=col_inside, other=0)
        a = tl.where(r[:, None] < col_rank[None, :], a, 0.0)
        b = tl.where(r[None, :] < row_rank[:, None], b, 0.0)
        product = dot(b, a, tl.zeros((BLOCK_N, BLOCK_C), tl.float32), INPUT_PRECISION)
        modulation = tl.where(row_block[:, None] == col_block[None, :], scaling * product, 0.0)
        delta = round_to(modulation * w.to(tl.float32), w.dtype)
        base = dot(w, x, base, INPUT_PRECISION)
        adapted = dot(delta, x, adapted, INPUT_PRECISION)

    y = adapted + tl.where(chunk == 0, base, 0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows, mask=row_inside, other=0.0).to(tl.float32)[:, None]
    slots = (chunk * SPLIT + part).to(tl.int64) * T + tokens
    out_ptrs = out_ptr + slots[None, :] * N + rows[:, None]
    tl.store(
        out_ptrs, round_to(y, out_ptr.dtype.element_ty), mask=token_inside[None, :] & row_inside[:, None]
    )


@triton.jit
def sum_parts_kernel(
    parts_ptr, bias_ptr, out_ptr, parts, size, N, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = elements < size
    y = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        y += tl.load(parts_ptr + (part * size.to(tl.int64) + elements), mask=inside, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + elements % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + elements, round_to(y, out_ptr.dtype.element_ty), mask=inside)


def fused_linear(
    x: Tensor,
    bias: Tensor | None,
    adapter: PackedAdapter,
    *,
    allow_tf32: bool = False,
    config: FusedLinearConfig | None = None,
) -> Tensor:
    """`y = x W_effᵀ + bias` (T, N) in x's dtype, without forming W_eff or ΔW; `adapter.T` makes it dX.

    Args:
        x: (T, C) in W0's dtype, any strides.
        bias: (N) contiguous, or None.
        adapter: weight and factors on x's device, ranks and scaling too.
        allow_tf32: multiply float32 operands in TF32.
        config: launch parameters.
    """
    w, a, b, partition = adapter.weight, adapter.A, adapter.B, adapter.partition
    T, (N, C), rank = x.shape[0], w.shape, a.shape[0]
    y = torch.empty(T, N, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    precision = input_precision(w.dtype, allow_tf32=allow_tf32)
    config = config or select(
        "fused_linear",
        x.device,
        w.dtype,
        precision,
        rank=rank,
        blocks=partition.num_blocks,
        out_features=N,
        in_features=C,
        tokens=T,
        transposed=w.stride(1) != 1,
    )
    chunk = min(config.block_r, max(16, triton.next_power_of_2(rank)))  # `tl.dot` takes no fewer than 16
    chunks = max(1, triton.cdiv(rank, chunk))
    parts = chunks * config.split
    out = y if parts == 1 else torch.empty(parts, T, N, dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(T, config.block_t) * triton.cdiv(N, config.block_n)
    fused_linear_kernel[(tiles * config.split, chunks)](
        x,
        w,
        bias,
        a,
        b,
        partition.row_block,
        partition.col_block,
        adapter.ranks,
        adapter.scaling,
        out,
        T,
        N,
        C,
        rank,
        *x.stride(),
        *w.stride(),
        *a.stride(),
        *b.stride(),
        INPUT_PRECISION=precision,
        W_TRANSPOSED=w.stride(1) != 1,
        HAS_BIAS=bias is not None and parts == 1,
        RANK_BLOCK=chunk,
        SPLIT=config.split,
        BLOCK_T=config.block_t,
        BLOCK_N=config.block_n,
        BLOCK_C=config.block_c,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if parts > 1:
        sum_parts(out, bias, y)
    return y


def sum_parts(parts: Tensor, bias: Tensor | None, out: Tensor, *, config: SumConfig | None = None) -> None:
    """`out = Σ parts + bias` in a fixed order: parts (P, T, N) float32, bias (N), out (T, N), all contiguous."""
    tokens, out_features = out.shape
    config = config or select("sum_parts", out.device, out.dtype, out_features=out_features, tokens=tokens)
    sum_parts_kernel[(triton.cdiv(out.numel(), config.block),)](
        parts,
        bias,
        out,
        parts.shape[0],
        out.numel(),
        out_features,
        HAS_BIAS=bias is not None,
        BLOCK=config.block,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
