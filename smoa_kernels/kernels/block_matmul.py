# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The adapter's output: all spectral blocks in one launch, each written directly to its columns of y.

    y[:, rows_k] = xg_k · ΔW_kᵀ for every block k;  rows of blocks without rank or columns get 0      (T, N)

ΔW is the left operand, so a program accumulates a tile of yᵀ, in float32. The same kernel computes the transposed
product, dX under dropout: dxg_k = dyg_k · ΔW_k is `adapter.T` with ΔWᵀ.

Layout of the pointers, every block padded with zeros to one width P_n or P_c, a multiple of the tile, so that
only tokens need a mask: x (T, K, P_c), last stride 1; delta, ΔW in block order, (K, P_n, P_c), any strides; out (T, N)
or padded (T, K, P_n), any strides; row_index (N), col_index (C) int64, row_offsets and col_offsets (K + 1) int32,
ranks (K) int32. If blocks consist of granules, x may be (T, C), in its own order; it is read a vector at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..definition.packed import PackedAdapter
from ..definition.precision import Precision
from .architectures import Architecture
from .common import OLD_TRITON, block_slots, dot, round_to, slot_coordinates
from .launch import Launch, Layout, described
from .spec import Config, Kernel, Key, on_amd, tile_divides
from .table import remembered


@triton.jit(do_not_specialize=["T", "num_blocks"])
def block_matmul_kernel(
    x_ptr,
    delta_ptr,
    ranks_ptr,
    row_index_ptr,
    col_index_ptr,
    row_offsets_ptr,
    col_offsets_ptr,
    out_ptr,
    T,
    num_blocks,
    padded_rows,
    padded_cols,
    stride_xt,
    stride_xk,
    stride_dk,
    stride_dn,
    stride_dc,
    stride_ot,
    stride_ok,
    stride_on,
    GRANULE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SCATTER: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    # Blocks are innermost: neighbouring columns of y belong to different blocks, so programs that run close together
    # complete the cache lines of y. Then come GROUP_T token tiles, which share ΔW in cache.
    tiles_n = padded_rows // BLOCK_N
    tiles_per_group = GROUP_T * num_blocks * tiles_n
    pid = tl.program_id(0)
    first_tile_t = pid // tiles_per_group * GROUP_T
    group = min(tl.cdiv(T, BLOCK_T) - first_tile_t, GROUP_T)
    pid = pid % tiles_per_group
    block = (pid % num_blocks).to(tl.int64)
    tile_t = first_tile_t + pid // num_blocks % group
    tile_n = pid // num_blocks // group

    row_slots = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.load(row_offsets_ptr + block + 1) - tl.load(row_offsets_ptr + block)
    col_start = tl.load(col_offsets_ptr + block)
    cols = tl.load(col_offsets_ptr + block + 1) - col_start
    cols = tl.where((tl.load(ranks_ptr + block) > 0) & (tile_n * BLOCK_N < rows), cols, 0)
    # At least one step, over zeros if need be. If the loop could be skipped, ptxas would not run wgmma with a computed
    # left operand asynchronously.
    steps = tl.maximum(tl.cdiv(cols, BLOCK_C), 1)
    tl.assume(steps > 0)

    tokens = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    token_valid = tokens < T
    col_slots = tl.arange(0, BLOCK_C)
    x_rows = x_ptr + tokens[None, :].to(tl.int64) * stride_xt
    x_ptrs = x_rows + block * stride_xk + col_slots[:, None]
    delta_ptrs = delta_ptr + block * stride_dk + row_slots[:, None].to(tl.int64) * stride_dn
    delta_ptrs += col_slots[None, :] * stride_dc
    step = tl.full((), BLOCK_C, tl.int64) * stride_dc

    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for i in range(steps):
        if IN_PLACE:
            columns, col_valid = slot_coordinates(
                col_index_ptr, col_start, cols, i * BLOCK_C + col_slots, GRANULE
            )
            x = tl.load(x_rows + columns[:, None], mask=token_valid[None, :] & col_valid[:, None], other=0.0)
        else:
            x = tl.load(x_ptrs, mask=token_valid[None, :], other=0.0)
            x_ptrs += BLOCK_C
        delta = tl.load(delta_ptrs)
        if TRANSPOSED and delta.dtype == tl.float32 and INPUT_PRECISION == "tf32":
            # This keeps the values, and the copy to shared memory 16 bytes wide, as in block_grad. Tried instead
            # (Triton 3.6, 3.9): `tl.multiple_of` with `tl.max_contiguous` copies 4 bytes on sm_90, a descriptor 4 bytes
            # on sm_80.
            delta = tl.where((row_slots < padded_rows)[:, None], delta, 0.0)
        acc = dot(delta, x, acc, INPUT_PRECISION)
        delta_ptrs += step

    if SCATTER:
        columns, row_valid = block_slots(row_index_ptr, row_offsets_ptr, block, row_slots, GRANULE)
        out_offsets = columns * stride_on
    else:
        out_offsets = block * stride_ok + row_slots.to(tl.int64) * stride_on
        row_valid = row_slots < padded_rows
    # Tokens first, so that neighbouring threads write along the rows of y.
    out_ptrs = out_ptr + tokens[:, None].to(tl.int64) * stride_ot + out_offsets[None, :]
    y = round_to(tl.trans(acc), out_ptr.dtype.element_ty)
    tl.store(out_ptrs, y, mask=token_valid[:, None] & row_valid[None, :])


def block_matmul(
    xg: Tensor,
    adapter: PackedAdapter,
    delta: Tensor,
    *,
    out: Tensor,
) -> Tensor:
    """Write `y[:, rows_k] = xg_k ΔW_kᵀ` of all blocks into `out`, every element once. Returns `out`.

    Args:
        xg: (T, K, P_c) in W0's dtype, columns in block order, zero in padding, from `permute.gather_columns`; if
            blocks consist of granules (`spec.granule_of`), x itself, (T, C), is allowed.
        adapter: the adapter of ΔW; `adapter.T` with dY gathered by rows computes dY ΔW.
        delta: ΔW (K, P_n, P_c) in W0's dtype, zero in padding: `modulate.modulated_blocks`, or that of the
            transposed adapter with its last two dimensions swapped.
        out: (T, N) for y in the layer's own order, or (T, K, P_n) for block order with zeros in padding; any
            strides and any float dtype.
    """
    xg = xg if xg.stride(-1) == 1 else xg.contiguous()
    layout, pointers = described(adapter)
    strides = xg.stride(), delta.stride(), out.stride()
    launch = _launch(layout, xg.shape[0], delta.shape[1:], *strides)
    if out.numel():
        launch(x_ptr=xg, delta_ptr=delta, out_ptr=out, **pointers)
    return out


@remembered
def _launch(
    layout: Layout,
    tokens: int,
    widths: Sequence[int],
    x_stride: Sequence[int],
    delta_stride: Sequence[int],
    out_stride: Sequence[int],
) -> Launch:
    padded_rows, padded_cols = widths
    in_place, natural, transposed = len(x_stride) == 2, len(out_stride) == 2, delta_stride[2] != 1
    config = layout.choose(
        "block_matmul",
        tokens=tokens,
        padded_out=padded_rows,
        padded_in=padded_cols,
        transposed=transposed,
        granule=layout.granule,
        dropout=layout.granule > 1 and not in_place,
    )
    if in_place:
        # Triton divides its stages between loading the index and loading x. With these stages, x has as many buffers
        # as a gathered x.
        config = replace(config, num_stages=2 * config.num_stages - 1)
    return Launch(
        block_matmul_kernel,
        (-(-tokens // config.block_t) * layout.num_blocks * (padded_rows // config.block_n),),
        config,
        layout,
        T=tokens,
        padded_rows=padded_rows,
        padded_cols=padded_cols,
        stride_xt=x_stride[0],
        stride_xk=0 if in_place else x_stride[1],
        stride_dk=delta_stride[0],
        stride_dn=delta_stride[1],
        stride_dc=delta_stride[2],
        stride_ot=out_stride[0],
        stride_ok=0 if natural else out_stride[1],
        stride_on=out_stride[-1],
        IN_PLACE=in_place,
        TRANSPOSED=transposed,
        SCATTER=natural,
    )


# Largest tile first; each passes the audit wherever `_shipped` ships it.
_SHIPPED = (
    Config(block_t=256, block_n=128, block_c=64, group_t=8, num_warps=8, num_stages=3),
    Config(block_t=128, block_n=128, block_c=64, group_t=8, num_warps=8, num_stages=3),
    Config(block_t=64, block_n=128, block_c=64, group_t=8, num_warps=4, num_stages=3),
    Config(block_t=64, block_n=64, block_c=64, group_t=8, num_warps=4, num_stages=3),
    Config(block_t=32, block_n=64, block_c=64, group_t=8, num_warps=4, num_stages=3),
)
# Smaller tiles for IEEE float32: NVIDIA has no tensor cores for it, and a thread holds its operands in registers.
_SHIPPED_IEEE = (
    Config(block_t=64, block_n=64, block_c=16, group_t=8, num_warps=8, num_stages=3),
    Config(block_t=64, block_n=32, block_c=32, group_t=8, num_warps=4, num_stages=3),
    Config(block_t=32, block_n=32, block_c=32, group_t=8, num_warps=4, num_stages=3),
)


def _shipped(arch: Architecture, precision: Precision) -> tuple[Config, ...]:
    full = precision.dtype == torch.float32
    if full and precision.ieee and not arch.is_amd:
        return (
            tuple(replace(config, num_warps=4) for config in _SHIPPED_IEEE) if OLD_TRITON else _SHIPPED_IEEE
        )
    most = 256 if arch.has_wide_tensor_cores else 128
    if OLD_TRITON and not arch.is_amd:  # it spills larger tiles
        most = 128 if arch.name == "sm_90" and not full else 64
    shipped = tuple(config for config in _SHIPPED if config.block_t <= most)
    if full:
        shipped = tuple(replace(config, block_c=config.block_c // 2) for config in shipped)
    return on_amd(shipped) if arch.is_amd else shipped


def _choose(fitting: Sequence[Config], key: Key, multiprocessors: int) -> Config:
    """Choose the largest tile of which there are enough to fill the device, else the smallest."""

    def tiles(config: Config) -> int:
        return -(-key.tokens // config.block_t) * key.blocks * (key.padded_out // config.block_n)

    return next((config for config in fitting if tiles(config) >= multiprocessors), fitting[-1])


BLOCK_MATMUL = Kernel(
    "block_matmul",
    block_matmul_kernel,
    shipped=_shipped,
    fits=tile_divides,
    choose=_choose,
)
