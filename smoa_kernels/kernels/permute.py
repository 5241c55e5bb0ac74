# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Copy columns of an activation to the padded block-major layout, and back, with dropout on the way.

    gather:   blocked[t, k, p] = m[t, j] · x[t, j],  j in slot p of block k; 0 in padding      (T, K, P)
    scatter:  x[t, j] = m[t, j] · blocked[t, k, p]: its adjoint                                (T, C)

Every column is in one slot: scatter writes each element of x once, without atomics. m is 1, or dropout's 0 and
1/(1-p): 16 bits of Philox per (seed, token, global column), drawn anew where it is needed and never stored.

Layout of the pointers: x (T, C) with any strides; blocked (T, K, P) contiguous; index (C) int64 and offsets
(K + 1) int32 as the partition holds them; seed one int64 element, or none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..definition.dropout import Dropout
from ..definition.partition import BlockPartition
from ..definition.precision import precision_of
from .architectures import BLACKWELL
from .common import TOKENS_PER_DRAW, block_slots, dropout_draws, dropout_multiplier, round_to
from .launch import Launch
from .spec import Config, Kernel, Key, Row, bucket, granule_of
from .table import cached, select


@triton.jit(do_not_specialize=["T", "column_offset", "threshold"])
def permute_kernel(
    x_ptr, index_ptr, offsets_ptr, seed_ptr, blocked_ptr,
    T, num_blocks, padded,
    stride_xt, stride_xc,
    column_offset, threshold, scale,
    GRANULE: tl.constexpr, SCATTER: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    # Neighbouring programs share their tokens, so that they use x's rows while these are in cache.
    tiles_p = tl.cdiv(padded, BLOCK_P)
    tiles_per_row = num_blocks * tiles_p
    block = tile % tiles_per_row // tiles_p
    slots = tile % tiles_p * BLOCK_P + tl.arange(0, BLOCK_P)
    cols, valid = block_slots(index_ptr, offsets_ptr, block, slots, GRANULE)
    # One draw serves TOKENS_PER_DRAW consecutive tokens, so the tile is processed as that many interleaved parts.
    GROUPS: tl.constexpr = BLOCK_T // TOKENS_PER_DRAW
    groups = tile // tiles_per_row * GROUPS + tl.arange(0, GROUPS)
    if DROPOUT:
        draws = dropout_draws(seed_ptr, groups, column_offset + cols)
    for lane in tl.static_range(TOKENS_PER_DRAW):
        tokens = groups.to(tl.int64) * TOKENS_PER_DRAW + lane
        x_ptrs = x_ptr + tokens[:, None] * stride_xt + cols[None, :] * stride_xc
        blocked_ptrs = blocked_ptr + (tokens[:, None] * num_blocks + block) * padded + slots[None, :]
        x_mask = (tokens < T)[:, None] & valid[None, :]
        blocked_mask = (tokens < T)[:, None] & (slots < padded)[None, :]
        # x is accessed in its own shape. In the shape of `blocked` it would have the layout of `blocked`, eight slots a
        # thread, and each lane of a request would touch another place of x. With one slot a thread, neighbouring lanes
        # access neighbouring columns of a block, which lie close together.
        x_ptrs, x_mask = x_ptrs[:, None, :], x_mask[:, None, :]
        if SCATTER:
            value = tl.load(blocked_ptrs, mask=blocked_mask, other=0.0)
        else:
            value = tl.reshape(tl.load(x_ptrs, mask=x_mask, other=0.0), (GROUPS, BLOCK_P))
        if DROPOUT:
            value = value.to(tl.float32) * dropout_multiplier(draws, lane, threshold, scale)
        if SCATTER:
            value = round_to(value, x_ptr.dtype.element_ty)
            tl.store(x_ptrs, tl.reshape(value, (GROUPS, 1, BLOCK_P)), mask=x_mask)
        else:
            tl.store(blocked_ptrs, round_to(value, blocked_ptr.dtype.element_ty), mask=blocked_mask)


def gather_columns(
    x: Tensor, partition: BlockPartition, width: int, *, dropout: Dropout | None = None
) -> Tensor:
    """Blocked copy (T, K, P) of x (T, C), zero in padding.

    Args:
        x: (T, C), any strides.
        partition: its blocks of columns are grouped; `partition.T` groups dY by rows of W0.
        width: P, from :func:`block_width`.
        dropout: its mask multiplies the copy.
    """
    blocked = x.new_empty(x.shape[0], len(partition.col_sizes), width)
    _move(x, blocked, partition, False, dropout)
    return blocked


def scatter_columns(
    blocked: Tensor, partition: BlockPartition, out: Tensor, *, dropout: Dropout | None = None
) -> Tensor:
    """Write blocked (T, K, P), contiguous, into out (T, C), any strides: every column once; padding is dropped.

    The adjoint of :func:`gather_columns` for the same partition and dropout. Returns `out`.
    """
    _move(out, blocked, partition, True, dropout)
    return out


def _move(
    x: Tensor, blocked: Tensor, partition: BlockPartition, scatter: bool, dropout: Dropout | None
) -> None:
    if blocked.numel() == 0:
        return
    granule = granule_of(partition.granularity, partition.shape)
    mask = None if dropout is None else (dropout.column_offset, dropout.threshold, dropout.scale)
    tokens, num_blocks, width = blocked.shape
    launch, tiles = _launch(
        x.device, x.dtype, x.shape[1], x.stride(), bucket(tokens), (num_blocks, width), granule, scatter, mask
    )
    pointers = {
        "x_ptr": x,
        "index_ptr": partition.col_index,
        "offsets_ptr": partition.col_offsets,
        "seed_ptr": None if dropout is None else dropout.seed,
        "blocked_ptr": blocked,
    }
    launch((-(-tokens // launch.config.block_t) * tiles, 1, 1), pointers, (tokens,))


@cached
def _launch(
    device: torch.device,
    dtype: torch.dtype,
    features: int,
    stride: Sequence[int],
    tokens: int,
    blocks: tuple[int, int],
    granule: int,
    scatter: bool,
    mask: tuple[int, int, float] | None,
) -> tuple[Launch, int]:
    """The launch, and the number of tiles that share their tokens."""
    num_blocks, width = blocks
    key = Key(
        "permute",
        precision_of(dtype, ieee=True).name,
        blocks=num_blocks,
        in_features=features,
        tokens=tokens,
        padded_in=width,
        granule=granule,
        dropout=mask is not None,
    )
    config = select(PERMUTE, key, device)
    column_offset, threshold, scale = mask or (0, 0, 1.0)
    launch = Launch(
        permute_kernel,
        config,
        num_blocks=num_blocks,
        padded=width,
        stride_xt=stride[0],
        stride_xc=stride[1],
        column_offset=column_offset,
        threshold=threshold,
        scale=scale,
        GRANULE=granule,
        SCATTER=scatter,
        DROPOUT=mask is not None,
    )
    return launch, num_blocks * -(-width // config.block_p)


def _tile(t: int, p: int, warps: int) -> Config:
    return Config(block_t=t, block_p=p, num_warps=warps)


# Each interleaved part of a tile is large enough for 128-bit accesses, also by wavefronts of 64 threads.
PERMUTE = Kernel(
    "permute",
    permute_kernel,
    rows=(
        # Two warps spill 88 bytes under dropout by Triton 3.8.
        Row(BLACKWELL, ("fp32",), (_tile(64, 128, 4),), before="3.9"),
        Row((), (), (_tile(64, 128, 2), _tile(128, 64, 2), _tile(128, 128, 4))),
    ),
    space={"block_t": (32, 64, 128, 256), "block_p": (32, 64, 128, 256), "num_warps": (1, 2, 4, 8)},
    fits=lambda config, key: 64 <= config.block_t * config.block_p // (32 * config.num_warps) <= 256,
)
