# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Shared by the kernels: the padded block-major layout, the rank product, the dot, the dropout mask, segments.

**Layout.** Coordinates of one side of W0 (rows or columns) are grouped by block and every block is padded to
one width P, a multiple of the tile, so that tiles never straddle blocks and their loads are 128 bits wide:

    slot (k, p) holds coordinate index[offsets[k] + p], valid where p < offsets[k + 1] - offsets[k]

`index` (int64) and `offsets` (int32, K + 1) are the partition's own tensors. The host knows P (`spec.block_width`), and
kernels read the tensors, so a launch never waits for the device.

**Offsets.** A number is made int64 before it is multiplied by a stride: T·N and T·C exceed 2³¹ in practice.

**Segments.** Pairs of a token and an expert are sorted by expert, and each expert's blocks of rows follow one another.
A tensor on the device holds their ends. A launch must not wait for it, so the grid has as many tiles as there could be,
and each program finds its own segment from the ends. Programs beyond the last tile return.

**Signatures.** Pointers, then sizes, then strides, then runtime scalars, then constexprs in capitals. Scaling
and seed are read through pointers: they are tensors on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Set when the kernels are defined, as Triton itself does: a process either interprets or compiles.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# The largest float32 that rounds to a finite TF32 is just below this: 0x7F7FF000.
LARGEST_TF32 = tl.constexpr(2.0**128 * (1 - 2.0**-12))

# One Philox call serves this many consecutive tokens of a column, 16 bits each.
TOKENS_PER_DRAW = tl.constexpr(8)
PHILOX_ROUNDS = tl.constexpr(7)


def power_of_two(count: int, least: int = 1) -> int:
    """The first power of two that is not less than `count` and `least`."""
    return max(least, 1 << max(count - 1, 0).bit_length())


def input_precision(dtype: torch.dtype, *, allow_tf32: bool) -> str:
    """How `dot` may round float32 operands if W0 has `dtype`; half operands are never rounded.

    With a half weight, tensor cores multiply float32 factors in TF32. `to_tf32` rounds them to nearest, as finely as
    float16 and eight times more finely than bfloat16. AMD's matrix cores multiply IEEE float32; most have no TF32.
    """
    if torch.version.hip is not None:
        return "ieee"
    return "tf32" if allow_tf32 or dtype != torch.float32 else "ieee"


@triton.jit
def dot(a, b, acc, INPUT_PRECISION: tl.constexpr):
    """acc + a b, accumulated in float32."""
    if INTERPRETED:
        # Triton 3.9's interpreter multiplies bfloat16 as raw uint16.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=INPUT_PRECISION)


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """Round `value` to `dtype`, to nearest even."""
    if INTERPRETED and (value.dtype == tl.float32 and dtype == tl.bfloat16):
        # Triton 3.9's interpreter truncates float32 to bfloat16, which doubles the error. So round the bits first.
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def to_tf32(value, INPUT_PRECISION: tl.constexpr):
    """Round a float32 operand of a TF32 product to nearest (ties away from zero), like PTX's `cvt.rna.tf32`.

    Triton leaves the rounding to the tensor core, which cuts off the low 13 bits (triton-lang/triton#4574). Each
    operand would shrink by 2^-11 on average, and so would every sum of products of one sign.
    """
    if INPUT_PRECISION == "tf32" and value.dtype == tl.float32:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
        # The tensor core still cuts off a value that would round to infinity. Infinity and NaN stay.
        value = tl.where(tl.abs(value) < LARGEST_TF32, rounded, value)
    return value


# Three steps that keep the values and steer the compiler. What was tried in their place: docs/internals/tried.md.


@triton.jit
def keep_in_registers(tile, inside):
    """A tile, zero outside already, which so reaches its product through registers.

    The compiler copies operands into shared memory asynchronously. Where tensor cores cannot read whole 128-bit words
    there (TF32, or W0 transposed), it narrows the copies to 4 bytes; the audit then finds narrow loads.
    """
    return tl.where(inside, tile, 0.0)


@triton.jit
def wait_for_products(acc, inside):
    """A sum of wgmma's products, zero outside already, that are complete before the loop goes on.

    Hopper's tensor cores read W0 from shared memory, of which Triton keeps one buffer, because W0 has another use
    (triton-lang/triton#3106 fixed the same for loads with one use). The next step's copy would overwrite the tile that
    they still read; the PTX emulator finds it.
    """
    return tl.where(inside, acc, 0.0)


@triton.jit
def hide_origin(values):
    """A reduction over one element, which hides how values were made: the compiler lays them out anew.

    Of labels, it hides that ΔW depends on a byte, for which Ampere's compiler lays the product out. Of a tile, it gives
    the store a layout of its own. Without it the audit finds synchronous loads, or spilled registers.
    """
    if len(values.shape) == 1:
        return tl.max(values[None, :], axis=0)
    else:  # noqa: RET505  Triton would compile what follows too
        return tl.sum(values[None, :, :], 0)


@triton.jit
def block_slots(index_ptr, offsets_ptr, block, slots, GRANULE: tl.constexpr):
    """Coordinates (int64) that `slots` of `block` hold, and which of the slots are not padding.

    GRANULE is a power of two. Every GRANULE slots hold adjacent coordinates, the first of them a multiple of GRANULE,
    and a block consists of granules. Hints say so to the compiler, which then loads and stores vectors.
    """
    start = tl.load(offsets_ptr + block)
    size = tl.load(offsets_ptr + block + 1) - start
    return slot_coordinates(index_ptr, start, size, slots, GRANULE)


@triton.jit
def slot_coordinates(index_ptr, start, size, slots, GRANULE: tl.constexpr):
    """Like `block_slots`, for a block that begins at `start` of the index."""
    if GRANULE == 1:
        valid = slots < size
        coordinates = tl.load(index_ptr + start + slots, mask=valid, other=0)
    else:
        valid = slots // GRANULE < size // GRANULE  # the compiler sees that a granule has one value
        coordinates = tl.load(index_ptr + tl.multiple_of(start, GRANULE) + slots, mask=valid, other=0)
        coordinates = tl.max_contiguous(tl.multiple_of(coordinates, GRANULE), GRANULE)
    return coordinates, valid


@triton.jit
def load_block(w_ptr, rows, cols, row_inside, col_inside, stride_wn, stride_wc, GRANULE: tl.constexpr):
    """A tile of W0 at these coordinates (int64), zero outside.

    Single coordinates are loaded in a shape of their own. In that of the tile the load would have the layout of the
    tile's other users, eight slots a thread, and each lane of a request would touch another place of W0. Here a warp
    reads 32 neighbouring columns of the block at a time. They lie close together in one row, and the lanes share the
    row's address.
    """
    if GRANULE > 1:
        w_ptrs = w_ptr + rows[:, None] * stride_wn + cols[None, :] * stride_wc
        return tl.load(w_ptrs, mask=row_inside[:, None] & col_inside[None, :], other=0.0)
    else:  # noqa: RET505  Triton would compile what follows too
        LANES: tl.constexpr = 32 if cols.shape[0] >= 32 else cols.shape[0]
        GROUPS: tl.constexpr = cols.shape[0] // LANES
        w_cols, inside = tl.reshape(cols, (GROUPS, 1, LANES)), tl.reshape(col_inside, (GROUPS, 1, LANES))
        w_ptrs = w_ptr + rows[None, :, None] * stride_wn + w_cols * stride_wc
        w = tl.load(w_ptrs, mask=row_inside[None, :, None] & inside, other=0.0)
        return tl.reshape(tl.permute(w, (1, 0, 2)), (rows.shape[0], cols.shape[0]))


@triton.jit
def rank_product(
    a_ptr, b_ptr,
    rows, cols, row_inside, col_inside, row_rank, col_rank, rank,
    stride_ar, stride_ac, stride_bn, stride_br,
    INPUT_PRECISION: tl.constexpr, RANK_BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ_t B[rows, t] A[t, cols] in float32, over the t < rank ≤ ρ that both the row's and the column's block have.

    rows and cols (int64) are the tile's coordinates, `*_inside` says which of them exist, and `*_rank` how many entries
    of each row of B and column of A are parameters. The others are padding. It is loaded and then cleared, because a
    mask that differs from row to row would make every load scalar.
    """
    product = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    a_ptrs = a_ptr + cols * stride_ac
    b_ptrs = b_ptr + rows * stride_bn
    for start in range(0, rank, RANK_BLOCK):
        t = start + tl.arange(0, RANK_BLOCK)
        below = t < rank
        a_mask = below[:, None] & col_inside[None, :]
        b_mask = row_inside[:, None] & below[None, :]
        a = tl.load(a_ptrs[None, :] + t[:, None] * stride_ar, mask=a_mask, other=0.0)
        b = tl.load(b_ptrs[:, None] + t[None, :] * stride_br, mask=b_mask, other=0.0)
        a = tl.where(t[:, None] < col_rank[None, :], a, 0.0)
        b = tl.where(t[None, :] < row_rank[:, None], b, 0.0)
        a, b = to_tf32(a, INPUT_PRECISION), to_tf32(b, INPUT_PRECISION)
        product = dot(b, a, product, INPUT_PRECISION)
    return product


@triton.jit
def dropout_draws(seed_ptr, groups, cols):
    """Four random words (G, P) for each group of TOKENS_PER_DRAW tokens and each global column."""
    column = tl.broadcast_to(cols.to(tl.uint32)[None, :], (groups.shape[0], cols.shape[0]))
    group = tl.broadcast_to(groups.to(tl.uint32)[:, None], (groups.shape[0], cols.shape[0]))
    return tl.philox(tl.load(seed_ptr), column, group, group * 0, group * 0, PHILOX_ROUNDS)


@triton.jit
def dropout_multiplier(draws, LANE: tl.constexpr, threshold, scale):
    """Multiplier (G, P) of token LANE of each group: 16 bits of the group's draws, compared with the threshold."""
    level = (draws[LANE // 2] >> (16 * (LANE % 2))) & 0xFFFF
    return tl.where(level.to(tl.int32) >= threshold, scale, 0.0)


@triton.jit
def segment_of(ends_ptr, segments, tile, BLOCK: tl.constexpr, SEGMENTS: tl.constexpr):
    """Find the segment of tile number `tile`. Returns the segment, where the tile begins, and where the segment ends.

    Every segment has its own tiles of BLOCK. Past the last tile, both the begin and the end are 0.
    """
    each = tl.arange(0, SEGMENTS)
    inside = each < segments
    ends = tl.load(ends_ptr + each, mask=inside, other=0)
    starts = tl.load(ends_ptr + each - 1, mask=inside & (each > 0), other=0)
    tiles = tl.where(inside, (ends - starts + BLOCK - 1) // BLOCK, 0)
    last = tl.cumsum(tiles, 0)
    segment = tl.sum((last <= tile).to(tl.int32), 0)
    here = each == segment
    first = tl.sum(tl.where(here, starts + (tile - last + tiles) * BLOCK, 0), 0)
    return segment, first, tl.sum(tl.where(here, ends, 0), 0)


def tiles_of_segments(length: int, segments: int, block: int) -> int:
    """The most tiles that `segments` of a total `length` can have: when all segments but one have length 1."""
    most = min(length, segments)
    return (length - most) // block + most


@triton.jit
def coordinates(index_ptr, first, end, GRANULE: tl.constexpr, INDEXED: tl.constexpr, BLOCK: tl.constexpr):
    """The coordinates (int64) that BLOCK slots from `first` on hold, and which of them lie before `end`.

    GRANULE is a power of two that divides `first` and `end`. Every GRANULE slots hold adjacent coordinates, the first
    of them a multiple of GRANULE. Hints say so to the compiler, which then loads and stores vectors.
    """
    # This keeps the value, and shows the compiler that GRANULE divides it. The compiler drops `tl.multiple_of` on the
    # result of a reduction or a loop: grouped_grad in bf16 then loads 2 bytes at a time and spills 248 (Triton 3.9,
    # sm_90).
    first = first // GRANULE * GRANULE
    slots = first + tl.arange(0, BLOCK)
    if GRANULE == 1:
        valid = slots < end
    else:
        valid = slots // GRANULE < end // GRANULE  # the compiler sees that a granule has one value
    if INDEXED:
        found = tl.load(index_ptr + slots, mask=valid, other=0).to(tl.int64)
        found = tl.max_contiguous(tl.multiple_of(found, GRANULE), GRANULE)
    else:
        found = slots.to(tl.int64)
    return found, valid
