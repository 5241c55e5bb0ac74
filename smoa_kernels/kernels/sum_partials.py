# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Sums of partial results in a fixed order: parts of y by `fused_linear`, of dA and dB by `contract`.

    out[m, n] = Σ_p partials[p, m, n] + bias[n]        for n < N

No atomics, and two runs agree bit for bit. A row of partials may be wider than N: those of dA and dB are
stores of 128 bits. dA is written transposed, (N, M).

Layout of the pointers, all contiguous: partials (P, M, W) float32; bias (N); out (M, N) or (N, M).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..definition.precision import precision_of
from .architectures import AMD
from .common import power_of_two, round_to
from .launch import Launch
from .spec import GRANULE, PARTIAL_RANKS, Config, Kernel, Key, Row, bucket
from .table import cached, select


@triton.jit(do_not_specialize=["row_groups", "parts", "groups"])
def sum_partials_kernel(
    partials_ptr, bias_ptr, out_ptr,
    row_groups, parts, groups, N,
    ROW_GROUP: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Sizes come in groups, so that the compiler knows the alignment of rows and columns, and that a group is wholly
    # inside or wholly outside.
    M, width = row_groups * ROW_GROUP, groups * GROUP
    row_inside = (m < M)[:, None]
    partial_ptrs = partials_ptr + m[:, None] * width + n[None, :]
    size = tl.cast(M, tl.int64) * width
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for part in range(parts):
        total += tl.load(partial_ptrs + part * size, mask=row_inside & (n < width)[None, :], other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    places = n[None, :].to(tl.int64) * M + m[:, None] if TRANSPOSED else m[:, None] * N + n[None, :]
    total = round_to(total, out_ptr.dtype.element_ty)
    tl.store(out_ptr + places, total, mask=row_inside & (n < N)[None, :])


def sum_partials(
    partials: Tensor, out: Tensor, *, bias: Tensor | None = None, transposed: bool = False
) -> None:
    """Write `out = Σ_p partials[p, :, :N] + bias`.

    Args:
        partials: (P, M, W) float32, contiguous.
        out: (M, N), or (N, M) if `transposed`, contiguous, any float dtype.
        bias: (N), contiguous.
        transposed: whether `out` is (N, M).
    """
    parts, M, width = partials.shape
    N = out.shape[0 if transposed else 1]
    row_group = GRANULE if transposed and M % GRANULE == 0 else 1
    shape = parts, width, N
    launch, block_m, tiles_n = _launch(
        out.device, out.dtype, bucket(M), shape, row_group, bias is not None, transposed
    )
    pointers = {"partials_ptr": partials, "bias_ptr": bias, "out_ptr": out}
    launch((-(-M // block_m), tiles_n, 1), pointers, (M // row_group,))


@cached
def _launch(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    shape: Sequence[int],
    row_group: int,
    has_bias: bool,
    transposed: bool,
) -> tuple[Launch, int, int]:
    """The launch, the rows of a tile, and the number of tiles of columns."""
    parts, width, N = shape
    name = precision_of(dtype, ieee=True).name
    config = select(SUM_PARTIALS, Key("sum_partials", name, out_features=N, tokens=tokens), device)
    block_n = min(power_of_two(width), 512)  # bounded, so that layers of many sizes share a compiled form
    block_m = config.block // block_n
    group = 1 if width % PARTIAL_RANKS else PARTIAL_RANKS
    launch = Launch(
        sum_partials_kernel,
        config,
        parts=parts,
        groups=width // group,
        N=N,
        ROW_GROUP=row_group,
        GROUP=group,
        HAS_BIAS=has_bias,
        TRANSPOSED=transposed,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
    )
    return launch, block_m, -(-width // block_n)


def _tiles(*blocks: int) -> tuple[Config, ...]:
    """Eight results a thread: 128 bits of half types. With more, registers spill on Blackwell."""
    return tuple(Config(block=block, num_warps=warps) for block, warps in zip(blocks, (4, 8, 2), strict=True))


SUM_PARTIALS = Kernel(
    "sum_partials",
    sum_partials_kernel,
    rows=(Row(AMD, (), _tiles(2048, 4096, 1024)), Row((), (), _tiles(1024, 2048, 512))),
    space={"block": (256, 512, 1024, 2048, 4096, 8192), "num_warps": (1, 2, 4, 8, 16)},
    fits=lambda config, key: 4 <= config.block // (32 * config.num_warps) <= 64,
)
