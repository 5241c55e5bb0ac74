# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The adapter's output: all spectral blocks in one launch, written straight to where their rows stand in y.

    y[:, rows_k] = xg_k · ΔW_kᵀ for every block k;  rows of blocks without rank or columns get 0      (T, N)

ΔW_k is either loaded or modulated in registers, ΔW_k = s · (B_k A_k) ∘ W0_k: as the left operand of the product
it never touches memory, which is why a tile of yᵀ is what accumulates, in float32. The transposed product, dX
under dropout, is the same kernel: dxg_k = dyg_k · ΔW_k is `adapter.T` with ΔWᵀ.

Layout of the pointers, every block padded with zeros to one width P_n or P_c, a multiple of the tile, so that
only tokens need a mask: x (T, K, P_c), last stride 1; weight, which is ΔW or W0 in block order, (K, P_n, P_c), any
strides; b (K, P_n, R) and a (K, P_c, R) contiguous, zero from rank r_k on; out (T, N) or padded (T, K, P_n), any
strides; row_index (N) int64, row_offsets and col_offsets (K + 1) int32, ranks (K) int32; scaling one element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cost.problem import WIDE_PADDING
from ..definition.packed import PackedAdapter
from .common import block_slots, dot, input_precision, padded_width, round_to
from .launch import BlockMatmulConfig
from .table import select

__all__ = ["block_matmul", "block_ordered"]

# R. More would cost more than reading ΔW does; with less, eight warps' loads of A would be narrower than 128 bits.
MAX_MODULATED_RANK = 32


@triton.jit(do_not_specialize=["tokens"])
def block_matmul_kernel(
    x_ptr,
    weight_ptr,
    b_ptr,
    a_ptr,
    scaling_ptr,
    ranks_ptr,
    row_index_ptr,
    row_offsets_ptr,
    col_offsets_ptr,
    out_ptr,
    tokens,
    num_blocks,
    padded_rows,
    padded_cols,
    stride_xt,
    stride_xk,
    stride_wk,
    stride_wn,
    stride_wc,
    stride_ot,
    stride_ok,
    stride_on,
    MODULATE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SCATTER: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    # GROUP_T token tiles walk all blocks together: they share ΔW in cache, and the cache lines of y, where
    # neighbouring columns belong to different blocks, are completed before they leave it.
    tiles_n = padded_rows // BLOCK_N
    tiles_per_group = GROUP_T * num_blocks * tiles_n
    pid = tl.program_id(0)
    first_tile_t = pid // tiles_per_group * GROUP_T
    group = min(tl.cdiv(tokens, BLOCK_T) - first_tile_t, GROUP_T)
    pid = pid % tiles_per_group
    tile_t = first_tile_t + pid % group
    tile_n = pid // group % tiles_n
    block = (pid // group // tiles_n).to(tl.int64)

    row_slots = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.load(row_offsets_ptr + block + 1) - tl.load(row_offsets_ptr + block)
    cols = tl.load(col_offsets_ptr + block + 1) - tl.load(col_offsets_ptr + block)
    cols = tl.where((tl.load(ranks_ptr + block) > 0) & (tile_n * BLOCK_N < rows), cols, 0)
    # At least one step, over zeros if need be: were the accumulator also set by a loop that is skipped, ptxas would
    # not run wgmma with a computed left operand asynchronously.
    steps = tl.maximum(tl.cdiv(cols, BLOCK_C), 1)
    tl.assume(steps > 0)

    tokens_here = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    token_valid = tokens_here < tokens
    col_slots = tl.arange(0, BLOCK_C)
    x_ptrs = x_ptr + block * stride_xk + tokens_here[None, :].to(tl.int64) * stride_xt + col_slots[:, None]
    weight_ptrs = weight_ptr + block * stride_wk + row_slots[:, None].to(tl.int64) * stride_wn
    weight_ptrs += col_slots[None, :] * stride_wc
    step = tl.full((), BLOCK_C, tl.int64) * stride_wc
    if MODULATE:
        slots_r = tl.arange(0, RANK)
        b = tl.load(b_ptr + (block * padded_rows + row_slots)[:, None] * RANK + slots_r[None, :])
        a_ptrs = a_ptr + (block * padded_cols + col_slots)[None, :] * RANK + slots_r[:, None]
        scaling = tl.load(scaling_ptr).to(tl.float32)

    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for _ in range(steps):
        x = tl.load(x_ptrs, mask=token_valid[None, :], other=0.0)
        delta = tl.load(weight_ptrs)
        if MODULATE:
            product = dot(b, tl.load(a_ptrs), tl.zeros((BLOCK_N, BLOCK_C), tl.float32), INPUT_PRECISION)
            delta = round_to(scaling * product * delta.to(tl.float32), x.dtype)
            a_ptrs += BLOCK_C * RANK
        elif TRANSPOSED and delta.dtype == tl.float32 and INPUT_PRECISION == "tf32":
            # Changes nothing: keeps the copy to shared memory 16 bytes wide, as in block_grad.
            delta = tl.where((row_slots < padded_rows)[:, None], delta, 0.0)
        acc = dot(delta, x, acc, INPUT_PRECISION)
        x_ptrs += BLOCK_C
        weight_ptrs += step

    if SCATTER:
        columns, row_valid = block_slots(row_index_ptr, row_offsets_ptr, block, row_slots)
        out_offsets = columns * stride_on
    else:
        out_offsets = block * stride_ok + row_slots.to(tl.int64) * stride_on
        row_valid = row_slots < padded_rows
    # Tokens first: rows of yᵀ are what neighbouring threads should write side by side.
    out_ptrs = out_ptr + tokens_here[:, None].to(tl.int64) * stride_ot + out_offsets[None, :]
    y = round_to(tl.trans(acc), out_ptr.dtype.element_ty)
    tl.store(out_ptrs, y, mask=token_valid[:, None] & row_valid[None, :])


def block_matmul(
    xg: Tensor,
    adapter: PackedAdapter,
    delta: Tensor | None,
    *,
    out: Tensor,
    weight_blocks: Tensor | None = None,
    allow_tf32: bool = False,
    config: BlockMatmulConfig | None = None,
) -> Tensor:
    """Write `y[:, rows_k] = xg_k ΔW_kᵀ` of all blocks into `out`, every element once. Returns `out`.

    Args:
        xg: (T, K, P_c) in W0's dtype, columns in block order, zero in padding: `permute.gather_columns`.
        adapter: whose ΔW; `adapter.T` with dY gathered by rows computes dY ΔW.
        delta: ΔW (K, P_n, P_c) in W0's dtype, zero in padding: `modulate.modulated_blocks`, or that of the
            transposed adapter with its last two dimensions swapped. None modulates W0 in registers instead, for
            ranks up to 32: worth it where `weight_blocks` is kept, and ΔW then needs no memory.
        out: (T, N) for y in the layer's own order, or (T, K, P_n) for block order with zeros in padding; any
            strides and any float dtype.
        weight_blocks: W0 in block order, from :func:`block_ordered`; made here where `delta` is None and it is
            not given. W0 is frozen, so a caller may keep it: 1/K of W0's memory.
        allow_tf32: let float32 products round their operands to TF32.
        config: launch parameters; the tile must divide P_n and P_c.

    Raises:
        ValueError: shapes that do not fit each other or the tile; a rank above 32 with `delta=None`.
    """
    partition = adapter.partition
    tokens, num_blocks, padded_cols = xg.shape
    if delta is None:
        weight = weight_blocks
        if weight is None:
            weight = block_ordered(adapter, row_multiple=WIDE_PADDING, col_multiple=padded_cols)
    else:
        weight = delta
    padded_rows = weight.shape[1]
    precision = input_precision(xg.dtype, allow_tf32=allow_tf32)
    config = config or select(
        "block_matmul",
        xg.device,
        xg.dtype,
        precision,
        rank=adapter.A.shape[0],
        blocks=num_blocks,
        out_features=partition.shape[0],
        in_features=partition.shape[1],
        tokens=tokens,
        padded_out=padded_rows,
        padded_in=padded_cols,
        transposed=weight.stride(2) != 1,
    )
    natural = out.ndim == 2
    expected = (tokens, partition.shape[0]) if natural else (tokens, num_blocks, padded_rows)
    if weight.shape[2] != padded_cols or weight.shape[0] != num_blocks or out.shape != expected:
        raise ValueError(
            f"xg {tuple(xg.shape)}, ΔW or W0 in blocks {tuple(weight.shape)} and out {tuple(out.shape)} "
            f"do not fit: out must be {expected}"
        )
    if padded_rows % config.block_n or padded_cols % config.block_c:
        raise ValueError(
            f"padded widths must be multiples of the tile ({config.block_n}, {config.block_c}), "
            f"got ({padded_rows}, {padded_cols})"
        )
    if out.numel() == 0:
        return out
    a, b = _block_factors(adapter, padded_rows, padded_cols) if delta is None else (None, None)
    xg = xg if xg.stride(2) == 1 else xg.contiguous()
    tiles = triton.cdiv(tokens, config.block_t) * num_blocks * (padded_rows // config.block_n)
    block_matmul_kernel[(tiles,)](
        xg,
        weight,
        b,
        a,
        adapter.scaling,
        adapter.ranks,
        partition.row_index,
        partition.row_offsets,
        partition.col_offsets,
        out,
        tokens,
        num_blocks,
        padded_rows,
        padded_cols,
        *xg.stride()[:2],
        *weight.stride(),
        out.stride(0),
        0 if natural else out.stride(1),
        out.stride(-1),
        MODULATE=delta is None,
        TRANSPOSED=weight.stride(2) != 1,
        SCATTER=natural,
        INPUT_PRECISION=precision,
        RANK=MAX_MODULATED_RANK,
        BLOCK_T=config.block_t,
        BLOCK_N=config.block_n,
        BLOCK_C=config.block_c,
        GROUP_T=config.group_t,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def block_ordered(adapter: PackedAdapter, *, row_multiple: int, col_multiple: int) -> Tensor:
    """W0 in block order, (K, P_n, P_c) in its dtype, zero in padding: what `block_matmul` modulates.

    Args:
        adapter: whose weight and partition.
        row_multiple: P_n is the largest block of rows, rounded up to this.
        col_multiple: likewise P_c.
    """
    partition = adapter.partition
    padded_rows = padded_width(partition.row_sizes, row_multiple)
    padded_cols = padded_width(partition.col_sizes, col_multiple)
    rows, row_valid = _padded_index(partition.row_index, partition.row_offsets, padded_rows)
    cols, col_valid = _padded_index(partition.col_index, partition.col_offsets, padded_cols)
    blocks = adapter.weight[rows[:, :, None], cols[:, None, :]]
    return blocks.masked_fill_(~(row_valid[:, :, None] & col_valid[:, None, :]), 0)


def _block_factors(adapter: PackedAdapter, padded_rows: int, padded_cols: int) -> tuple[Tensor, Tensor]:
    """A (K, P_c, R) and B (K, P_n, R) in block order, zero past each block's rank; R = 32."""
    rho = adapter.A.shape[0]
    if rho > MAX_MODULATED_RANK:
        raise ValueError(
            f"ΔW is modulated in registers up to rank {MAX_MODULATED_RANK}, got {rho}: pass delta"
        )
    partition = adapter.partition
    below = torch.arange(rho, device=adapter.ranks.device) < adapter.ranks[:, None, None]

    def ordered(factor: Tensor, index: Tensor, offsets: Tensor, width: int) -> Tensor:
        slots, valid = _padded_index(index, offsets, width)
        blocks = factor[slots].masked_fill_(~(valid[:, :, None] & below), 0)
        return torch.nn.functional.pad(blocks, (0, MAX_MODULATED_RANK - rho)).contiguous()

    a = ordered(adapter.A.T, partition.col_index, partition.col_offsets, padded_cols)
    return a, ordered(adapter.B, partition.row_index, partition.row_offsets, padded_rows)


def _padded_index(index: Tensor, offsets: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Coordinates (K, width) that the slots of each block hold, and which of the slots are not padding."""
    slots = torch.arange(width, device=index.device)
    valid = slots < offsets.diff()[:, None]
    return index[torch.where(valid, offsets[:-1, None] + slots, 0)], valid
