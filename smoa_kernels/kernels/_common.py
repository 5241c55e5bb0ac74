# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""What the kernels share: the padded block-major layout, the rank product, the dot, the dropout mask.

**Layout.** Coordinates of one side of W0 (rows or columns) are grouped by block and every block is padded to
one width P, a multiple of the tile, so that tiles never straddle blocks and their loads are 128 bits wide:

    slot (k, p) holds coordinate index[offsets[k] + p], valid where p < offsets[k + 1] - offsets[k]

`index` (int64) and `offsets` (int32, K + 1) are the partition's own tensors: P is known on the host
(`padded_width`), the rest is read inside the kernels, so a launch never waits for the device.

**Offsets.** Whatever is multiplied by a stride is int64 first: T·N and T·C pass 2³¹ in practice.

**Signatures.** Pointers, then sizes, then strides, then runtime scalars, then constexprs in capitals. Scaling
and seed are read through pointers: they are tensors on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "INTERPRETED",
    "Dropout",
    "block_slots",
    "dot",
    "dropout_multiplier",
    "input_precision",
    "padded_width",
    "rank_product",
]

# Set when the kernels are defined, as Triton itself does: a process either interprets or compiles.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

_LEVELS = 1 << 16
# One Philox call serves this many consecutive tokens of a column, 16 bits each.
TOKENS_PER_DRAW = tl.constexpr(8)


@dataclass(frozen=True)
class Dropout:
    """The adapter's dropout: a mask that is a function of (seed, token, global column), never stored.

    Attributes:
        seed: int64 with one element, on the device of x.
        p: probability in [0, 1), rounded to a multiple of 2⁻¹⁶; the scale is that of the rounded p.
        column_offset: global index of this shard's first column.
    """

    seed: Tensor
    p: float
    column_offset: int = 0

    @property
    def threshold(self) -> int:
        """A 16-bit draw below this is dropped."""
        return round(self.p * _LEVELS)

    @property
    def scale(self) -> float:
        """What a kept element is multiplied with."""
        return _LEVELS / (_LEVELS - self.threshold)


def padded_width(sizes: Sequence[int], multiple: int) -> int:
    """P: the largest block, rounded up to a multiple of the tile."""
    return int(triton.cdiv(max(sizes), multiple)) * multiple


def input_precision(dtype: torch.dtype, *, allow_tf32: bool) -> str:
    """How `dot` may round float32 operands; for half types both names mean the same exact product."""
    return "tf32" if allow_tf32 and dtype == torch.float32 else "ieee"


@triton.jit
def dot(a, b, acc, INPUT_PRECISION: tl.constexpr):
    """acc + a b, accumulated in float32."""
    if INTERPRETED:
        # Triton 3.9's interpreter multiplies bfloat16 as raw uint16.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=INPUT_PRECISION)


@triton.jit
def block_slots(index_ptr, offsets_ptr, block, slots):
    """Coordinates (int64) that `slots` of `block` hold, and which of the slots are not padding."""
    start = tl.load(offsets_ptr + block)
    valid = slots < tl.load(offsets_ptr + block + 1) - start
    return tl.load(index_ptr + start + slots, mask=valid, other=0), valid


@triton.jit
def rank_product(
    a_ptr,
    b_ptr,
    rows,
    cols,
    row_rank,
    col_rank,
    rank,
    stride_ar,
    stride_ac,
    stride_bn,
    stride_br,
    INPUT_PRECISION: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
):
    """Σ_t B[rows, t] A[t, cols] in float32, t below `rank`, at most ρ.

    rows, cols (int64) are the tile's coordinates; row_rank, col_rank how many entries of each B row and A
    column are parameters, 0 for coordinates outside: one comparison masks bounds and rank padding alike.
    RANK_BLOCK = 1 multiplies in registers; 16 and more go through `dot`.
    """
    product = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    a_ptrs = a_ptr + cols * stride_ac
    b_ptrs = b_ptr + rows * stride_bn
    if RANK_BLOCK == 1:
        for t in range(rank):
            a = tl.load(a_ptrs + t * stride_ar, mask=t < col_rank, other=0.0).to(tl.float32)
            b = tl.load(b_ptrs + t * stride_br, mask=t < row_rank, other=0.0).to(tl.float32)
            product += b[:, None] * a[None, :]
    else:
        for start in range(0, rank, RANK_BLOCK):
            t = start + tl.arange(0, RANK_BLOCK)
            a = tl.load(
                a_ptrs[None, :] + t[:, None] * stride_ar, mask=t[:, None] < col_rank[None, :], other=0.0
            )
            b = tl.load(
                b_ptrs[:, None] + t[None, :] * stride_br, mask=t[None, :] < row_rank[:, None], other=0.0
            )
            product = dot(b, a, product, INPUT_PRECISION)
    return product


@triton.jit
def dropout_multiplier(draws, LANE: tl.constexpr, threshold, scale):
    """Multiplier of token 8·group + LANE from the four words that `tl.philox` drew for (group, column)."""
    level = (draws[LANE // 2] >> (16 * (LANE % 2))) & 0xFFFF
    return tl.where(level >= threshold, scale, 0.0)
