# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""dA and dB, the gradients of the factors, over all spectral blocks in one launch.

    G_k = dyg_kᵀ · xg_k,   H_k = s · G_k ∘ W0_k,   dB_k = H_k · A_kᵀ,   dA_k = B_kᵀ · H_k

G is never in memory. One program accumulates one tile of G_k over its tokens in registers, multiplies it by the tile
of W0 and contracts it with the tile's rows of B and columns of A. It writes only these small partial results. A second
kernel, `sum_partials.py`, adds them in a fixed order, without atomics, so two runs agree bit for bit. The contraction
is linear in G, so the tokens can be split among programs.

Layout of the pointers: dy (T, K, P_n) and x (T, K, P_c) padded block-major with zeros in padding, last stride 1; or,
if blocks consist of granules, dy (T, N) and x (T, C) in the layer's own order; weight (N, C), a (ρ, C), b (N, ρ) in the
layer's own coordinates, any strides, read through row_index (N), col_index (C) int64 and row_offsets, col_offsets
(K + 1) int32; ranks (K) int32; scaling one element; partial_b (splits · column tiles, N, R) and partial_a
(splits · row tiles, C, R) float32, contiguous.

R is ρ rounded up to a whole group of ranks: a row of partials is a multiple of 128 bits, one store.
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
from .architectures import Architecture, multiprocessors
from .common import OLD_TRITON, block_slots, dot, round_to, to_tf32
from .launch import Launch, Layout, described
from .spec import PARTIAL_RANKS, Config, Kernel, block_width, partial_width, tile_divides
from .sum_partials import sum_partials
from .table import remembered

# Ranks that the contraction takes at a time: as few as `tl.dot` allows, because the tile of G stays in registers.
RANK_CHUNK = 16
# Ranks of a group: 128 bits of float32. The kernel gets the number of groups, so the compiler knows the alignment.
GROUP = tl.constexpr(PARTIAL_RANKS)
EPILOGUE_STEPS = 11  # assumed cost of a program's epilogue, in steps of its main loop


@triton.jit(do_not_specialize=["T", "tiles_n", "tiles_c", "rank", "rank_groups"])
def block_grad_kernel(
    dy_ptr,
    x_ptr,
    w_ptr,
    a_ptr,
    b_ptr,
    scaling_ptr,
    ranks_ptr,
    row_index_ptr,
    col_index_ptr,
    row_offsets_ptr,
    col_offsets_ptr,
    partial_a_ptr,
    partial_b_ptr,
    T,
    tokens_per_split,
    N,
    C,
    tiles_n,
    tiles_c,
    rank,
    rank_groups,
    stride_dyt,
    stride_dyk,
    stride_xt,
    stride_xk,
    stride_wn,
    stride_wc,
    stride_ar,
    stride_ac,
    stride_bn,
    stride_br,
    GRANULE: tl.constexpr,
    DY_IN_PLACE: tl.constexpr,
    X_IN_PLACE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tile_c = tl.program_id(0) % tiles_c
    tile_n = tl.program_id(0) // tiles_c % tiles_n
    block = (tl.program_id(0) // tiles_c // tiles_n).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    row_slots = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    col_slots = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)

    rank = tl.minimum(tl.load(ranks_ptr + block), rank)
    rows = tl.load(row_offsets_ptr + block + 1) - tl.load(row_offsets_ptr + block)
    cols = tl.load(col_offsets_ptr + block + 1) - tl.load(col_offsets_ptr + block)
    # A tile past the end of its block takes no token and no rank, and writes zeros.
    rank = tl.where((tile_n * BLOCK_N < rows) & (tile_c * BLOCK_C < cols), rank, 0)

    # G_k's tile, summed over the split's tokens.
    first = split * tokens_per_split
    last = tl.where(rank > 0, min(first + tokens_per_split, T), first)
    slots_t = tl.arange(0, BLOCK_T)
    if DY_IN_PLACE:
        dy_columns, row_valid = block_slots(row_index_ptr, row_offsets_ptr, block, row_slots, GRANULE)
    else:
        dy_columns = block * stride_dyk + row_slots
    if X_IN_PLACE:
        x_columns, col_valid = block_slots(col_index_ptr, col_offsets_ptr, block, col_slots, GRANULE)
    else:
        x_columns = block * stride_xk + col_slots
    dy_ptrs = dy_ptr + (first + slots_t)[None, :] * stride_dyt + dy_columns[:, None]
    x_ptrs = x_ptr + (first + slots_t)[:, None] * stride_xt + x_columns[None, :]
    step = tl.full((), BLOCK_T, tl.int64)
    grad = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_T):
        token_valid = slots_t < last - start
        # The gathered layout has zeros beyond a block's end.
        dy_valid = token_valid[None, :] & row_valid[:, None] if DY_IN_PLACE else token_valid[None, :]
        x_valid = token_valid[:, None] & col_valid[None, :] if X_IN_PLACE else token_valid[:, None]
        dy = tl.load(dy_ptrs, mask=dy_valid, other=0.0)
        x = tl.load(x_ptrs, mask=x_valid, other=0.0)
        if x.dtype == tl.float32 and INPUT_PRECISION == "tf32":
            # This keeps the values and takes the tiles through registers. Hopper and Blackwell read TF32 operands from
            # registers, or K-major from shared memory. K is the tokens here, the slow dimension, so a tile that is
            # passed straight to `dot` is copied 4 bytes at a time. Tried instead (Triton 3.6, 3.9): `tl.multiple_of`
            # with `tl.max_contiguous` copies 4 bytes on sm_90, a descriptor 4 bytes on sm_80.
            dy = tl.where(token_valid[None, :], dy, 0.0)
            x = tl.where(token_valid[:, None], x, 0.0)
        grad = dot(dy, x, grad, INPUT_PRECISION)
        dy_ptrs += step * stride_dyt
        x_ptrs += step * stride_xt

    # TF32 is no finer than float16. With a float16 weight, rounding float32 factors to TF32 put single elements of dA
    # and dB over their error budget. Half factors are exact in TF32.
    IN_PARTS: tl.constexpr = (
        INPUT_PRECISION == "tf32"
        and w_ptr.dtype.element_ty != tl.float32
        and a_ptr.dtype.element_ty == tl.float32
    )

    # H_k = s · G_k ∘ W0_k, a quarter of the columns at a time: the gather of W0 takes an address per element, and the
    # addresses of a whole tile do not fit in the registers.
    QUARTER: tl.constexpr = BLOCK_C // 4
    rows, row_valid = block_slots(row_index_ptr, row_offsets_ptr, block, row_slots, GRANULE)
    left, right = halves(grad)
    quarters = halves(left) + halves(right)
    scaling = tl.load(scaling_ptr).to(tl.float32)
    h = ()
    for q in tl.static_range(4):
        slots = tile_c * BLOCK_C + q * QUARTER + tl.arange(0, QUARTER)
        cols, col_valid = block_slots(col_index_ptr, col_offsets_ptr, block, slots, GRANULE)
        w_ptrs = w_ptr + rows[:, None] * stride_wn + cols[None, :] * stride_wc
        w = tl.load(w_ptrs, mask=row_valid[:, None] & col_valid[None, :], other=0.0)
        # Concatenated because Triton does not unpack tuples; mypy takes h for an empty tuple.
        product = scaling * quarters[q] * w.to(tl.float32)
        h = h + (in_parts(product, IN_PARTS, INPUT_PRECISION),)  # type: ignore[assignment]  # noqa: RUF005

    # dB_k = H_k · A_kᵀ and dA_k = B_kᵀ · H_k, a few ranks at a time.
    width = rank_groups * GROUP
    row_start = (split * tiles_c + tile_c) * N
    col_start = (split * tiles_n + tile_n) * C
    for start in tl.range(
        0, width, BLOCK_R, num_stages=1
    ):  # prefetched factors would not fit in the registers
        t = start + tl.arange(0, BLOCK_R)
        below = (t < rank)[None, :]  # ranks beyond get zeros, whatever W0 and the factors' padding hold
        b_ptrs = b_ptr + rows[:, None] * stride_bn + t[None, :] * stride_br
        b = tl.load(b_ptrs, mask=row_valid[:, None] & below, other=0.0)
        b = in_parts(b.to(tl.float32), IN_PARTS, INPUT_PRECISION)
        db = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        for q in tl.static_range(4):
            slots = tile_c * BLOCK_C + q * QUARTER + tl.arange(0, QUARTER)
            cols, col_valid = block_slots(col_index_ptr, col_offsets_ptr, block, slots, GRANULE)
            a_ptrs = a_ptr + cols[:, None] * stride_ac + t[None, :] * stride_ar
            a = tl.load(a_ptrs, mask=col_valid[:, None] & below, other=0.0)
            a = in_parts(a.to(tl.float32), IN_PARTS, INPUT_PRECISION)
            db = dot_parts(h[q], a, db, IN_PARTS, INPUT_PRECISION)
            da = tl.zeros((QUARTER, BLOCK_R), tl.float32)
            da = dot_parts(transposed(h[q], IN_PARTS), b, da, IN_PARTS, INPUT_PRECISION)
            da_ptrs = partial_a_ptr + (col_start + cols)[:, None] * width + t[None, :]
            tl.store(da_ptrs, tl.where(below, da, 0.0), mask=col_valid[:, None] & (t < width)[None, :])
        db_ptrs = partial_b_ptr + (row_start + rows)[:, None] * width + t[None, :]
        tl.store(db_ptrs, tl.where(below, db, 0.0), mask=row_valid[:, None] & (t < width)[None, :])


@triton.jit
def halves(tile):
    """Split a tile into the left and the right half of its columns. `tl.split` needs a last dimension of two."""
    rows: tl.constexpr = tile.shape[0]
    cols: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (rows, 2, cols // 2)), (0, 2, 1)))


@triton.jit
def in_parts(value, IN_PARTS: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """Prepare a float32 operand for tensor cores: rounded, or as two bfloat16 parts that keep 16 of its bits."""
    if IN_PARTS:
        high = round_to(value, tl.bfloat16)
        return high, round_to(value - high.to(tl.float32), tl.bfloat16)
    else:  # noqa: RET505  Triton would compile what follows too
        return (to_tf32(value, INPUT_PRECISION),)


@triton.jit
def transposed(operand, IN_PARTS: tl.constexpr):
    """Transpose an operand from `in_parts`."""
    if IN_PARTS:
        return tl.trans(operand[0]), tl.trans(operand[1])
    else:  # noqa: RET505
        return (tl.trans(operand[0]),)


@triton.jit
def dot_parts(a, b, acc, IN_PARTS: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """acc + a b of operands from `in_parts`. The product of the low parts is left out; it is 2^-16 of the result.

    `tl.dot` computes the same with "bf16x3", but keeps H in float32: a tile spills (sm_90), and the kernel issues 5 to
    11 % more instructions.
    """
    if IN_PARTS:
        acc = dot(a[1], b[0], acc, INPUT_PRECISION)
        acc = dot(a[0], b[1], acc, INPUT_PRECISION)
    return dot(a[0], b[0], acc, INPUT_PRECISION)


def block_grad(
    dyg: Tensor,
    xg: Tensor,
    adapter: PackedAdapter,
) -> tuple[Tensor, Tensor]:
    """dA (ρ, C) and dB (N, ρ) of all blocks, in the factors' dtypes; rows and columns t ≥ r_k are exactly 0.

    Args:
        dyg: dY (T, K, P_n) in W0's dtype, gathered by rows of W0, from `permute.gather_columns`. If blocks consist of
            granules (`spec.granule_of`), dY itself, (T, N), is allowed.
        xg: the adapter's input (T, K, P_c), gathered by columns and masked by dropout, or (T, C).
        adapter: weight, factors, partition, ranks and scaling.
    """
    A, B, partition = adapter.A, adapter.B, adapter.partition
    dA, dB = A.new_empty(*A.shape), B.new_empty(*B.shape)  # torch parses numbers faster than a size
    if dA.numel() == 0 or dB.numel() == 0:
        return dA, dB
    layout, pointers = described(adapter)
    dyg = dyg if dyg.stride(-1) == 1 else dyg.contiguous()
    xg = xg if xg.stride(-1) == 1 else xg.contiguous()
    # Operands in their own order are tiled like gathered ones; the kernel masks what lies past a block's end.
    widths = (
        block_width(partition.row_sizes) if dyg.ndim == 2 else dyg.shape[2],
        block_width(partition.col_sizes) if xg.ndim == 2 else xg.shape[2],
    )
    launch, (slots_a, slots_b) = _launch(layout, dyg.shape[0], widths, dyg.stride(), xg.stride())
    width, (N, C) = partial_width(layout.rank), layout.features
    partial_a = dyg.new_empty(slots_a, C, width, dtype=torch.float32)
    partial_b = dyg.new_empty(slots_b, N, width, dtype=torch.float32)
    launch(dy_ptr=dyg, x_ptr=xg, partial_a_ptr=partial_a, partial_b_ptr=partial_b, **pointers)
    sum_partials(partial_a, dA, transposed=True)
    sum_partials(partial_b, dB)
    return dA, dB


@remembered
def _launch(
    layout: Layout,
    tokens: int,
    widths: tuple[int, int],
    dy_stride: Sequence[int],
    x_stride: Sequence[int],
) -> tuple[Launch, tuple[int, int]]:
    """The launch, and how many partials of dA and of dB it has."""
    padded_rows, padded_cols = widths
    dy_in_place, x_in_place = len(dy_stride) == 2, len(x_stride) == 2
    config = layout.choose(
        "block_grad",
        tokens=tokens,
        padded_out=padded_rows,
        padded_in=padded_cols,
        granule=layout.granule,
        factors=layout.factors,
        dropout=dy_in_place and not x_in_place,
    )
    tiles_n, tiles_c = padded_rows // config.block_n, padded_cols // config.block_c
    programs = layout.num_blocks * tiles_n * tiles_c
    splits = config.split or token_splits(tokens, programs, multiprocessors(layout.device), config.block_t)
    launch = Launch(
        block_grad_kernel,
        (programs, splits),
        config,
        layout,
        T=tokens,
        tokens_per_split=-(-tokens // (splits * config.block_t)) * config.block_t,
        tiles_n=tiles_n,
        tiles_c=tiles_c,
        rank_groups=partial_width(layout.rank) // PARTIAL_RANKS,
        stride_dyt=dy_stride[0],
        stride_dyk=0 if dy_in_place else dy_stride[1],
        stride_xt=x_stride[0],
        stride_xk=0 if x_in_place else x_stride[1],
        DY_IN_PLACE=dy_in_place,
        X_IN_PLACE=x_in_place,
        BLOCK_R=RANK_CHUNK,
    )
    return launch, (splits * tiles_n, splits * tiles_c)


def token_splits(tokens: int, programs: int, processors: int, block_t: int) -> int:
    """Choose how many programs share the tokens of a tile, to fill a GPU; 1 if there are enough tiles.

    Each program keeps at least as many steps of the main loop as its epilogue costs.

    Args:
        tokens: T.
        programs: tiles of G in all blocks.
        processors: multiprocessors of the GPU.
        block_t: tokens in a step.

    Example:
        >>> token_splits(8192, 32, 132, 64)  # 160 programs
        5
    """
    return max(1, min(-(-processors // programs), tokens // (EPILOGUE_STEPS * block_t)))


# Bytes of shared memory for H transposed, in the first configuration on NVIDIA. AMD's compiler needs fewer.
_LARGEST_NEEDS = 138 * 1024
_SHIPPED = (
    Config(block_n=128, block_c=128, block_t=64, num_warps=8, num_stages=3),
    Config(block_n=64, block_c=128, block_t=64, num_warps=8, num_stages=3),
    Config(block_n=128, block_c=64, block_t=64, num_warps=4, num_stages=3),
    Config(block_n=64, block_c=64, block_t=64, num_warps=4, num_stages=3),
)
_SHIPPED_FP32 = (
    Config(block_n=128, block_c=128, block_t=32, num_warps=8, num_stages=3),
    Config(block_n=64, block_c=128, block_t=32, num_warps=4, num_stages=3),
    Config(block_n=128, block_c=64, block_t=32, num_warps=8, num_stages=3),
    Config(block_n=64, block_c=64, block_t=32, num_warps=8, num_stages=2),
)
# For IEEE float32 on NVIDIA, which has no tensor cores for it.
_SHIPPED_IEEE = (
    Config(block_n=64, block_c=64, block_t=32, num_warps=8, num_stages=3),
    Config(block_n=64, block_c=64, block_t=16, num_warps=8, num_stages=3),
    Config(block_n=16, block_c=64, block_t=32, num_warps=4, num_stages=2),
)


def _shipped(arch: Architecture, precision: Precision) -> tuple[Config, ...]:
    if precision.ieee and not arch.is_amd:
        return _SHIPPED_IEEE
    full = precision.dtype == torch.float32
    shipped: tuple[Config, ...] = _SHIPPED_FP32 if full else _SHIPPED
    if not arch.is_amd and arch.shared_per_block < _LARGEST_NEEDS:
        shipped = shipped[1:]
    if OLD_TRITON and arch.name == "sm_80" and not full:  # it spills 32 bytes of the largest
        return shipped[1:]
    if OLD_TRITON and arch.name == "sm_100" and full:  # 16 bytes of the second
        return (shipped[0], *shipped[2:])
    if OLD_TRITON and arch.name == "sm_120" and not full:  # 4 bytes
        return tuple(replace(config, num_warps=4, num_stages=2) for config in shipped)
    return shipped


BLOCK_GRAD = Kernel(
    "block_grad",
    block_grad_kernel,
    shipped=_shipped,
    fits=tile_divides,
)
