# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Base and adapter in one pass over W0, for few tokens; with W0's strides swapped, dX.

    y[t, i] = Σ_j x[t, j] · W0[i, j]  +  Σ_j x[t, j] · ΔW[i, j]  +  bias[i]                      (T, N)
    ΔW[i, j] = s · [b(i) = c(j)] · W0[i, j] · Σ_r B[i, r] A[r, j], made in registers, never in memory

Both products add to one float32 sum, which is rounded once. A small ΔW added to W0 first would be lost in W0's
rounding. A small output added to a rounded y would be lost in y's rounding (docs/numerics.md). W0 is the left operand,
yᵀ = W0 xᵀ. So N, not the few tokens, lies along the long side of the tensor cores, and ΔW enters its product from
registers.

If y has few tiles, `split` programs share the sum over C. The parts are float32 sums that `sum_partials.py` adds in
a fixed order. A rank too large for one product is taken in chunks, in a loop inside the loop over C; then the operands
of the next step are not loaded ahead.

Layout of the pointers: x (T, C), w (N, C), a (ρ, C), b (N, ρ) with any strides; bias (N) contiguous; row_block (N)
and col_block (C) labels, uint8 or int32; ranks (K) int32; scaling one element; out contiguous, y (T, N) in x's
dtype or the parts (split, T, N) in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..definition.packed import PackedAdapter
from .architectures import ADA, AMD, GEFORCE_BLACKWELL, HOPPER
from .common import dot, hide_origin, keep_in_registers, power_of_two, round_to, to_tf32, wait_for_products
from .launch import Launch, Layout, operands_of
from .spec import HALF, Config, Kernel, Key, Row, bucket
from .sum_partials import sum_partials
from .table import cached


@triton.jit(do_not_specialize=["T", "split"])
def fused_linear_kernel(
    x_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, row_block_ptr, col_block_ptr, ranks_ptr, scaling_ptr, out_ptr,
    T, N, C, rank, split,
    stride_xt, stride_xc, stride_wn, stride_wc, stride_ar, stride_ac, stride_bn, stride_br,
    INPUT_PRECISION: tl.constexpr, W_TRANSPOSED: tl.constexpr, WGMMA: tl.constexpr, HAS_BIAS: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr, RANK_BLOCK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    tiles_t = tl.cdiv(T, BLOCK_T)
    part = tile % split
    tokens = (tile // split % tiles_t).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = (tile // split // tiles_t).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token_inside = tokens < T
    row_inside = rows < N
    row_block = hide_origin(tl.load(row_block_ptr + rows, mask=row_inside, other=0).to(tl.int32))
    row_rank = tl.minimum(tl.load(ranks_ptr + row_block, mask=row_inside, other=0), rank)
    scaling = tl.load(scaling_ptr).to(tl.float32)
    # SIDE_BY_SIDE: the product has room for the ranks of every block. Each row of B and column of A fills the ranks of
    # its own block and has zeros in the others. So the product is zero where blocks differ, if the factors are finite.
    t = tl.arange(0, RANK_BLOCK)
    r = t % rank if SIDE_BY_SIDE else t
    rank_block = t // rank if SIDE_BY_SIDE else t
    b_ptrs = b_ptr + rows[:, None] * stride_bn + r[None, :] * stride_br

    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    # The compiler knows that there is at least one step. If the loop could be skipped, ptxas would not run wgmma
    # asynchronously. Columns past C are masked.
    steps = tl.maximum(tl.cdiv(tl.cdiv(C, BLOCK_C), split), 1)
    tl.assume(steps > 0)
    for step in range(steps):
        cols = (part * steps + step) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
        col_inside = cols < C
        w_ptrs = w_ptr + rows[:, None] * stride_wn + cols[None, :] * stride_wc
        w = tl.load(w_ptrs, mask=row_inside[:, None] & col_inside[None, :], other=0.0)
        x_ptrs = x_ptr + tokens[None, :] * stride_xt + cols[:, None] * stride_xc
        x = tl.load(x_ptrs, mask=token_inside[None, :] & col_inside[:, None], other=0.0)
        col_block = hide_origin(tl.load(col_block_ptr + cols, mask=col_inside, other=0).to(tl.int32))
        col_rank = tl.load(ranks_ptr + col_block, mask=col_inside, other=0)
        THROUGH_REGISTERS: tl.constexpr = w.dtype == tl.float32 or (W_TRANSPOSED and not WGMMA)
        if THROUGH_REGISTERS:
            # Hopper's tensor cores can read a transposed W0: the copy then has no bank conflicts, and through registers
            # it has four-way ones.
            w = keep_in_registers(w, row_inside[:, None])

        product = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        for chunk in range(CHUNKS):
            start = chunk * RANK_BLOCK
            a_ptrs = a_ptr + (start + r)[:, None] * stride_ar + cols[None, :] * stride_ac
            a = tl.load(a_ptrs, mask=(start + r < rank)[:, None] & col_inside[None, :], other=0.0)
            b_mask = row_inside[:, None] & (start + r < rank)[None, :]
            b = tl.load(b_ptrs + start * stride_br, mask=b_mask, other=0.0)
            a_valid = (start + r)[:, None] < col_rank[None, :]
            b_valid = (start + r)[None, :] < row_rank[:, None]
            if SIDE_BY_SIDE:
                a_valid &= rank_block[:, None] == col_block[None, :]
                b_valid &= rank_block[None, :] == row_block[:, None]
            a = to_tf32(tl.where(a_valid, a, 0.0), INPUT_PRECISION)
            b = to_tf32(tl.where(b_valid, b, 0.0), INPUT_PRECISION)
            product = dot(b, a, product, INPUT_PRECISION)
        product *= scaling
        if not SIDE_BY_SIDE:
            product = tl.where(row_block[:, None] == col_block[None, :], product, 0.0)
        delta = round_to(product * w.to(tl.float32), w.dtype)
        acc = dot(delta, x, acc, INPUT_PRECISION)
        acc = dot(w, x, acc, INPUT_PRECISION)
        if WGMMA:
            acc = wait_for_products(acc, row_inside[:, None])

    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows, mask=row_inside, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out_ptr + (part.to(tl.int64) * T + tokens)[None, :] * N + rows[:, None]
    y = round_to(acc, out_ptr.dtype.element_ty)
    tl.store(out_ptrs, y, mask=token_inside[None, :] & row_inside[:, None])


def fused_linear(x: Tensor, bias: Tensor | None, adapter: PackedAdapter) -> Tensor:
    """`y = x W_effᵀ + bias` (T, N) in x's dtype, without forming W_eff or ΔW; `adapter.T` makes it dX.

    Args:
        x: (T, C) in W0's dtype, any strides.
        bias: (N) contiguous, or None.
        adapter: weight and factors on x's device, ranks and scaling too.
    """
    T, N = x.shape[0], adapter.weight.shape[0]
    y = x.new_empty(T, N)
    if y.numel() == 0:
        return y
    launch = operands_of(adapter).get(_launch, bucket(T), x.stride(), bias is not None)
    config = launch.config
    parts = config.split
    out = y if parts == 1 else x.new_empty((parts, T, N), dtype=torch.float32)
    tiles = -(-T // config.block_t) * -(-N // config.block_n)
    launch((tiles * parts, 1, 1), {"x_ptr": x, "bias_ptr": bias, "out_ptr": out}, (T,))
    if parts > 1:
        sum_partials(out, y, bias=bias)
    return y


@cached
def _launch(layout: Layout, tokens: int, x_stride: Sequence[int], has_bias: bool) -> Launch:
    rank = layout.rank
    config = layout.choose(FUSED_LINEAR, tokens=tokens, transposed=layout.transposed)
    chunk = min(config.block_r, power_of_two(rank, 16))  # the least that `tl.dot` takes
    return Launch(
        fused_linear_kernel,
        config,
        layout,
        split=config.split,
        stride_xt=x_stride[0],
        stride_xc=x_stride[1],
        HAS_BIAS=has_bias and config.split == 1,
        SIDE_BY_SIDE=layout.num_blocks > 1 and 0 < rank * layout.num_blocks <= chunk,
        RANK_BLOCK=chunk,
        CHUNKS=max(1, -(-rank // chunk)),
    )


def _narrowest(widths: Iterable[int], tokens: int) -> int:
    """The narrowest tile that holds all tokens, else the widest."""
    widths = sorted(widths)
    return next((width for width in widths if width >= tokens), widths[-1])


def _choose(shipped: Sequence[Config], key: Key, multiprocessors: int) -> Config:
    """Choose the narrowest tile that holds all tokens; split its sum over C if y has few tiles."""
    block_t = _narrowest({config.block_t for config in shipped}, key.tokens)
    narrowest = [config for config in shipped if config.block_t == block_t]
    tiles = -(-key.tokens // block_t) * -(-key.out_features // narrowest[0].block_n)
    few = tiles < 2 * multiprocessors
    return max(narrowest, key=lambda config: config.split if few else -config.split)


def _fits(config: Config, key: Key) -> bool:
    """In IEEE float32 a thread holds the depth of its operands in registers, so tiles are an eighth as large."""
    tile = config.block_n * config.block_c // (1 if key.dtype == "fp32" else 8)
    return config.block_t == _narrowest((16, 32), key.tokens) and 256 <= tile <= 1024


def _tiles(n: int, c: int, r: int, warps: int, stages: int, wgmma: bool = False) -> tuple[Config, ...]:
    """Of 16 tokens, with the sum over C split among 4, 2 or no programs."""
    options: dict[str, Any] = {"block_r": r, "num_warps": warps, "num_stages": stages, "wgmma": wgmma}
    return tuple(Config(block_t=16, block_n=n, block_c=c, split=split, **options) for split in (4, 2, 1))


def _wide(warps: int, stages: int, wgmma: bool = False) -> Config:
    """Of 32 tokens. With more ranks or tokens registers spill."""
    return replace(_tiles(64, 64, 64, warps, stages, wgmma)[-1], block_t=32)


FUSED_LINEAR = Kernel(
    "fused_linear",
    fused_linear_kernel,
    rows=(
        Row(AMD, HALF, (*_tiles(64, 64, 64, 2, 2), _wide(2, 2))),
        Row(AMD, (), _tiles(64, 32, 64, 2, 2)),
        # IEEE float32: NVIDIA has no tensor cores for it, and a thread holds the whole depth of its operands in
        # registers. Longer steps spill 4 to 56 bytes by Triton 3.6 and 3.7, and two warps on sm_120.
        Row(ADA, ("fp32",), _tiles(16, 32, 16, 4, 3), before="3.8"),
        Row((), ("fp32",), _tiles(16, 16, 16, 2, 3), before="3.8"),
        Row(GEFORCE_BLACKWELL, ("fp32",), _tiles(16, 32, 16, 4, 3)),
        Row((), ("fp32",), _tiles(16, 32, 16, 2, 3)),
        # A column's label, its block's rank and the mask of A are a chain of loads, among which Triton divides the
        # stages (triton-lang/triton#4721). Three stages leave one buffer of W0, five leave two.
        Row(HOPPER, HALF, (*_tiles(64, 64, 64, 4, 5, wgmma=True), _wide(4, 5, wgmma=True))),
        Row(HOPPER, (), _tiles(64, 32, 64, 4, 5)),
        # With three stages ρ = 4 spills 4 bytes, transposed.
        Row(GEFORCE_BLACKWELL, HALF, (*_tiles(64, 64, 64, 4, 4), _wide(4, 3)), before="3.7"),
        Row((), HALF, (*_tiles(64, 64, 64, 4, 3), _wide(4, 3))),
        Row((), (), _tiles(64, 32, 64, 4, 3)),
    ),
    choose=_choose,
    space={
        "block_t": (16, 32),
        "block_n": (16, 32, 64, 128),
        "block_c": (16, 32, 64, 128),
        "split": (1, 4),
        "num_stages": (2, 3, 5),
    },
    fits=_fits,
    # Every tile of tokens reads W0, every tile of rows x; parts of the sum are written and read.
    traffic=lambda config, key: (
        2 * key.in_features * key.out_features * -(-key.tokens // config.block_t)
        + 2 * key.tokens * key.in_features * -(-key.out_features // config.block_n)
        + 8 * key.tokens * key.out_features * (config.split if config.split > 1 else 0)
    ),
)
