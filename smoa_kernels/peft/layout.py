"""What an adapter file holds of a layer beside its factors: blocks, ranks and the sketch of W0, as one row of bytes.

An entry of a safetensors file costs some 120 bytes of header, as much as the labels of a small layer, so that these
share one (`smoa_blocks`, uint8, little-endian):

    uint32   K, the CRC-32 of all that follows, the rank of each block
    float16  the sketch, 33 numbers
    bits     the block of each row, then of each column: ceil(log2 K) bits each, the lowest first

Zeros stand for blocks that are yet to be loaded.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checks import (
    MOST_BLOCKS,
    MOST_SIZE,
    check_blocks,
    check_count,
    check_kind,
    layout_of,
)
from ..definition.partition import BlockPartition
from ..definition.sketch import SKETCH_SIZE

__all__ = ["STATE_KEYS", "LayerBlocks", "blocks_size", "pack_blocks", "read_blocks", "unpack_blocks"]


# Every tensor of a layer's adapter that a file holds.
STATE_KEYS = ("smoa_A", "smoa_B", "smoa_blocks")


class LayerBlocks(NamedTuple):
    """What an adapter file holds of a layer beside its factors.

    Attributes:
        partition: blocks of W0's rows and columns.
        ranks: int32 (K,).
        sketch: float32 (33,), of W0.

    Example:
        >>> partition = BlockPartition.from_weight(torch.randn(6, 8), num_blocks=2)
        >>> LayerBlocks(partition, torch.tensor([2, 2]), torch.zeros(33)).partition.num_blocks
        2
    """

    partition: BlockPartition
    ranks: Tensor
    sketch: Tensor


def blocks_size(out_features: int, in_features: int, num_blocks: int) -> int:
    """Bytes of the packed form.

    Args:
        out_features: N.
        in_features: C.
        num_blocks: K.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Example:
        >>> blocks_size(6, 8, num_blocks=2)  # 16 of numbers and ranks, 66 of the sketch, 14 bits of labels
        84
    """
    check_count("out_features", out_features, 1, MOST_SIZE)
    check_count("in_features", in_features, 1, MOST_SIZE)
    check_blocks(num_blocks)
    bits = (out_features + in_features) * _label_bits(num_blocks)
    return 4 * (2 + num_blocks) + 2 * SKETCH_SIZE + -(-bits // 8)


def pack_blocks(partition: BlockPartition, ranks: Tensor, sketch: Tensor) -> Tensor:
    """uint8 vector on the CPU; a number of the sketch beyond float16's range becomes infinite.

    Args:
        partition: blocks of W0's rows and columns.
        ranks: int (K,).
        sketch: float32 (33,), from :func:`smoa_kernels.definition.sketch.sketch_weight`.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Example:
        >>> partition = BlockPartition.from_weight(torch.randn(6, 8), num_blocks=2)
        >>> packed = pack_blocks(partition, torch.tensor([2, 2]), torch.zeros(33))
        >>> packed.dtype, packed.shape
        (torch.uint8, torch.Size([84]))
    """
    check_kind("partition", partition, BlockPartition)
    _check_vector("ranks", ranks, partition.num_blocks, floating=False)
    _check_vector("sketch", sketch, SKETCH_SIZE, floating=True)
    labels = torch.cat([partition.row_block, partition.col_block]).cpu().numpy()
    shifts = np.arange(_label_bits(partition.num_blocks))
    parts = (
        ranks.cpu().numpy().astype("<u4"),
        sketch.cpu().numpy().astype("<f2"),
        np.packbits((labels[:, None] >> shifts & 1).astype(np.uint8), bitorder="little"),
    )
    body = b"".join(part.tobytes() for part in parts)
    head = np.array([partition.num_blocks, zlib.crc32(body)], dtype="<u4").tobytes()
    return torch.frombuffer(bytearray(head + body), dtype=torch.uint8)


def unpack_blocks(packed: Tensor, out_features: int, in_features: int) -> LayerBlocks:
    """Inverse of :func:`pack_blocks` for a layer of shape (out_features, in_features); on `packed`'s device.

    Args:
        packed: uint8 vector.
        out_features: N.
        in_features: C.

    Raises:
        TypeError: `packed` is no dense tensor, or a size no int.
        ValueError: another dtype or size than such a layer's, no values, a wrong checksum, labels out of range.

    Example:
        >>> partition = BlockPartition.from_weight(torch.randn(6, 8), num_blocks=2)
        >>> packed = pack_blocks(partition, torch.tensor([2, 2]), torch.zeros(33))
        >>> unpack_blocks(packed, 6, 8).partition == partition
        True
    """
    _check_dense("smoa_blocks", packed)
    if packed.dtype != torch.uint8 or packed.ndim != 1:
        raise ValueError(f"smoa_blocks must be a vector of uint8, got {packed.dtype} {tuple(packed.shape)}")
    data = packed.detach().cpu().contiguous().numpy()
    num_blocks, checksum = (int(n) for n in data[:8].view("<u4")) if len(data) >= 8 else (0, 0)
    if not 1 <= num_blocks <= MOST_BLOCKS or len(data) != blocks_size(out_features, in_features, num_blocks):
        raise ValueError(
            f"smoa_blocks must hold the block labels of {out_features} rows and {in_features} columns, got "
            f"{len(data)} bytes that say num_blocks={num_blocks}"
        )
    body = data[8:]
    if zlib.crc32(body.tobytes()) != checksum:
        raise ValueError("smoa_blocks is corrupt: its labels, ranks and sketch do not have its checksum")
    ranks, sketch, bits = np.split(body, [4 * num_blocks, 4 * num_blocks + 2 * SKETCH_SIZE])
    width = _label_bits(num_blocks)
    count = out_features + in_features
    planes = np.unpackbits(bits, count=count * width, bitorder="little").reshape(count, width)
    labels = torch.from_numpy(planes.astype(np.int32) @ (1 << np.arange(width, dtype=np.int32)))
    rows, cols = labels.to(packed.device).split([out_features, in_features])
    partition = BlockPartition.from_labels(rows, cols, num_blocks)
    return LayerBlocks(
        partition,
        torch.from_numpy(ranks.view("<u4").astype(np.int32)).to(packed.device),
        torch.from_numpy(sketch.view("<f2").astype(np.float32)).to(packed.device),
    )


def read_blocks(name: str, given: Mapping[str, Any], r: int | None = None) -> LayerBlocks:
    """Blocks, ranks and sketch out of the tensors of one layer, which are checked against each other.

    Args:
        name: of the layer, for messages.
        given: tensors by `STATE_KEYS`, None for one that is missing.
        r: the rank budget, where it is known.

    Raises:
        TypeError: naming the layer: what is no dense tensor.
        ValueError: naming the layer: a tensor that is missing, what :func:`unpack_blocks` finds wrong, factors of
            another kind, or ranks that do not fit.

    Example:
        >>> partition = BlockPartition.from_weight(torch.randn(6, 8), num_blocks=2)
        >>> blocks = pack_blocks(partition, torch.tensor([2, 2]), torch.zeros(33))
        >>> read_blocks("proj", {"smoa_A": torch.ones(2, 8), "smoa_B": torch.ones(6, 2), "smoa_blocks": blocks}).ranks
        tensor([2, 2], dtype=torch.int32)
    """
    check_complete(name, given)
    A, B = given["smoa_A"], given["smoa_B"]
    for key, factor in (("smoa_A", A), ("smoa_B", B)):
        _check_dense(f"{name}: {key}", factor, values=False)
        if factor.ndim != 2 or not factor.is_floating_point():
            raise ValueError(
                f"{name}: {key} must be a matrix of floating-point numbers, got {factor.dtype} {tuple(factor.shape)}"
            )
    try:
        blocks = unpack_blocks(given["smoa_blocks"], B.shape[0], A.shape[1])
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
    ranks = blocks.ranks.tolist()
    r = sum(ranks) if r is None else r
    if min(ranks) < 0 or max(ranks) != A.shape[0] or A.shape[0] != B.shape[1] or sum(ranks) != r:
        raise ValueError(f"{name}: ranks must sum to r={r} with a largest rank of {A.shape[0]}, got {ranks}")
    return blocks


def check_complete(name: str, given: Mapping[str, Any]) -> None:
    """Whether none of a layer's tensors is missing."""
    check_kind("given", given, Mapping)
    missing = [key for key in STATE_KEYS if given.get(key) is None]
    if missing:
        raise ValueError(f"{name}: the adapter lacks {', '.join(missing)}; nothing was loaded")


def _check_dense(name: str, value: Tensor, *, values: bool = True) -> None:
    """Whether it is a tensor as files hold them; with `values`, one that can be read."""
    check_kind(name, value, Tensor)
    if layout_of(value) != "torch.strided":
        raise TypeError(f"{name} must be a dense tensor, got layout {layout_of(value)}")
    if values and value.is_meta:
        raise ValueError(f"{name} must hold numbers, got a meta tensor")


def _check_vector(name: str, value: Tensor, size: int, *, floating: bool) -> None:
    _check_dense(name, value)
    real = not value.is_complex() and value.dtype != torch.bool
    if not real or value.is_floating_point() != floating or value.shape != (size,):
        kind = "floating-point numbers" if floating else "ints"
        raise ValueError(f"{name} must be {size} {kind}, got {value.dtype} of shape {tuple(value.shape)}")


def _label_bits(num_blocks: int) -> int:
    return (num_blocks - 1).bit_length()
