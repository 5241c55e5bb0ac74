"""The format of an adapter's file: its tensors of each layer, and the row of bytes that holds blocks, ranks and sketch.

An entry of a safetensors file costs some 120 bytes of header, as much as the labels of a small layer, so these share
one (`smoa_blocks`, uint8, little-endian):

    uint32   K, the CRC-32 of all that follows, the rank of each block
    float16  the sketch of W0, 33 numbers
    bits     the block of each row, then of each column: ceil(log2 K) bits each, the lowest first

Zeros stand for blocks that are yet to be loaded. Of the fused weight of E experts, `smoa_A` (E, ρ, C) and `smoa_B`
(E, N, ρ) hold each expert's factors, and `smoa_blocks` a row for each.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checks import MOST_BLOCKS
from ..definition.experts import ExpertBlocks
from ..definition.partition import BlockPartition
from ..definition.sketch import SKETCH_SIZE, sketch_distance, sketch_weight

__all__ = [
    "STATE_KEYS",
    "LayerBlocks",
    "StackBlocks",
    "blocks_size",
    "check_complete",
    "pack_blocks",
    "pack_expert_blocks",
    "read_blocks",
    "unpack_blocks",
    "unpack_expert_blocks",
]


# The tensors of a layer's adapter.
STATE_KEYS = ("smoa_A", "smoa_B", "smoa_blocks")


class LayerBlocks(NamedTuple):
    """What an adapter's file holds of a layer beside its factors."""

    partition: BlockPartition
    ranks: Tensor  # int32 (K,)
    sketch: Tensor  # float32 (33,), of W0

    def facing(self, stored: Tensor) -> tuple[Tensor, float]:
        """Turn a matrix as a base stores it into W0 (N, C), and tell how far it is from the one trained over.

        A Conv1D stores W0ᵀ, and so do some classes of experts. Which one it is, a square matrix shows by its sketch
        alone. The distance of a matrix of another shape is infinite.
        """
        ways = [way for way in (stored, stored.T) if tuple(way.shape) == self.partition.shape]
        if not ways:
            return stored, float("inf")
        distances = [sketch_distance(self.sketch, sketch_weight(way)) for way in ways]
        nearest = min(distances)
        return ways[distances.index(nearest)], nearest


class StackBlocks(NamedTuple):
    """The same of a fused weight of experts."""

    partition: ExpertBlocks
    ranks: Tensor  # int32 (K,), of every expert
    sketch: Tensor  # float32 (E, 33)
    shape: tuple[int, int]  # (N, C)

    def experts(self) -> list[LayerBlocks]:
        """What it holds of each expert."""
        partitions = self.partition.partitions(range(len(self.sketch)), self.shape)
        return [
            LayerBlocks(partition, self.ranks, sketch)
            for partition, sketch in zip(partitions, self.sketch, strict=True)
        ]


def blocks_size(out_features: int, in_features: int, num_blocks: int) -> int:
    """Count the bytes of `smoa_blocks` for a layer of this shape with K blocks."""
    bits = (out_features + in_features) * _label_bits(num_blocks)
    return 4 * (2 + num_blocks) + 2 * SKETCH_SIZE + -(-bits // 8)


def pack_blocks(partition: BlockPartition, ranks: Tensor, sketch: Tensor) -> Tensor:
    """Pack blocks, ranks and sketch into uint8 bytes on the CPU; a sketch beyond float16's range becomes infinite."""
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
    """Unpack what :func:`pack_blocks` packed for a layer of this shape, on the same device.

    Raises:
        ValueError: `packed` has another dtype or size than such a layer's, a wrong checksum, or labels out of range.
    """
    if packed.dtype != torch.uint8 or packed.ndim != 1:
        raise ValueError(f"smoa_blocks must be a vector of uint8, got {packed.dtype} {tuple(packed.shape)}")
    rows = _unpack(packed[None], out_features, in_features, lambda expert: "smoa_blocks")
    partition = BlockPartition.from_labels(rows.rows[0], rows.cols[0], rows.num_blocks)
    return LayerBlocks(partition, rows.ranks[0], rows.sketches[0])


def pack_expert_blocks(
    blocks: ExpertBlocks, ranks: Tensor, sketches: Tensor, shape: tuple[int, int]
) -> Tensor:
    """Pack the blocks of a fused weight's experts, each of a `shape` (N, C), into a row for each sketch (E, 33)."""
    partitions = blocks.partitions(range(len(sketches)), shape)
    rows = [
        pack_blocks(partition, ranks, sketch)
        for partition, sketch in zip(partitions, sketches.cpu(), strict=True)
    ]
    return torch.stack(rows)


def unpack_expert_blocks(packed: Tensor, out_features: int, in_features: int) -> StackBlocks:
    """Unpack what :func:`pack_expert_blocks` packed, all rows at once: a model has thousands of experts.

    Raises:
        ValueError: naming the expert, as :func:`unpack_blocks` does; or experts differ in K or ranks.
    """
    if packed.dtype != torch.uint8 or packed.ndim != 2:
        raise ValueError(
            f"smoa_blocks must have a row of uint8 for each expert, got {packed.dtype} {tuple(packed.shape)}"
        )
    rows = _unpack(packed, out_features, in_features, lambda expert: f"smoa_blocks of expert {expert}")
    other = (rows.ranks != rows.ranks[0]).any(1).nonzero()
    if len(other):
        raise ValueError(f"smoa_blocks of expert {int(other[0])} has other ranks than those of expert 0")
    blocks = ExpertBlocks.from_labels(rows.rows, rows.cols, rows.num_blocks)
    return StackBlocks(blocks, rows.ranks[0], rows.sketches, (out_features, in_features))


class _Rows(NamedTuple):
    """Rows of `smoa_blocks`, unpacked."""

    num_blocks: int
    ranks: Tensor  # int32 (E, K)
    sketches: Tensor  # float32 (E, 33)
    rows: Tensor  # labels (E, N)
    cols: Tensor  # labels (E, C)


def _unpack(packed: Tensor, out_features: int, in_features: int, name: Callable[[int], str]) -> _Rows:
    """Unpack rows (E, bytes) of one K; `name` says in messages what a row is."""
    data = packed.detach().cpu().contiguous().numpy()
    num_blocks = int(data[0, :4].view("<u4")[0]) if data.shape[1] >= 8 else 0
    if not 1 <= num_blocks <= MOST_BLOCKS or data.shape[1] != blocks_size(
        out_features, in_features, num_blocks
    ):
        raise ValueError(
            f"smoa_blocks must hold the block labels of {out_features} rows and {in_features} columns, got "
            f"{data.shape[1]} bytes that say num_blocks={num_blocks}"
        )
    for expert, row in enumerate(data):
        head = row[:8].view("<u4")
        if head[0] != num_blocks or zlib.crc32(row[8:]) != head[1]:
            raise ValueError(
                f"{name(expert)} is corrupt: its labels, ranks and sketch do not match its checksum"
            )
    ranks, sketches, bits = np.split(data[:, 8:], [4 * num_blocks, 4 * num_blocks + 2 * SKETCH_SIZE], axis=1)
    width, count = _label_bits(num_blocks), out_features + in_features
    planes = np.unpackbits(bits, axis=1, count=count * width, bitorder="little")
    planes = planes.reshape(len(data), count, width)
    labels = np.zeros((len(data), count), np.uint8 if num_blocks <= 256 else np.int32)
    for bit in range(width):
        labels |= planes[..., bit].astype(labels.dtype) << bit
    wrong = np.flatnonzero((labels >= num_blocks).any(1))
    if wrong.size:
        raise ValueError(f"{name(int(wrong[0]))} must have labels below num_blocks={num_blocks}")
    rows, cols = torch.from_numpy(labels).to(packed.device).split([out_features, in_features], 1)
    return _Rows(
        num_blocks,
        torch.from_numpy(np.ascontiguousarray(ranks).view("<u4").astype(np.int32)).to(packed.device),
        torch.from_numpy(np.ascontiguousarray(sketches).view("<f2").astype(np.float32)).to(packed.device),
        rows,
        cols,
    )


def read_blocks(name: str, given: Mapping[str, Any], r: int) -> LayerBlocks | StackBlocks:
    """Read blocks, ranks and sketch out of the tensors of one layer, after checking these against each other.

    Args:
        name: the layer's name, for messages.
        given: tensors by `STATE_KEYS`, None for one that is missing.
        r: the rank budget.

    Raises:
        ValueError: naming the layer: a tensor is missing, factors are no matrices of floating-point numbers (or no
            stacks of them), :func:`unpack_blocks` finds a fault, or the ranks do not fit.
    """
    check_complete(name, given)
    A, B = given["smoa_A"], given["smoa_B"]
    for key, factor in (("smoa_A", A), ("smoa_B", B)):
        if factor.ndim not in (2, 3) or not factor.is_floating_point():
            raise ValueError(
                f"{name}: {key} must be a matrix of floating-point numbers, got {factor.dtype} "
                f"{tuple(factor.shape)}; of experts, a stack of them"
            )
    packed = given["smoa_blocks"]
    if A.shape[:-2] != B.shape[:-2] or (A.ndim == 3 and (not len(A) or packed.shape[:-1] != A.shape[:1])):
        raise ValueError(
            f"{name}: smoa_A, smoa_B and smoa_blocks must be of as many experts, got {tuple(A.shape)}, "
            f"{tuple(B.shape)} and {tuple(packed.shape)}"
        )
    unpack = unpack_blocks if A.ndim == 2 else unpack_expert_blocks
    try:
        blocks: LayerBlocks | StackBlocks = unpack(packed, B.shape[-2], A.shape[-1])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    ranks, rho = blocks.ranks.tolist(), A.shape[-2]
    if min(ranks) < 0 or max(ranks) != rho or rho != B.shape[-1] or sum(ranks) != r:
        raise ValueError(f"{name}: ranks must sum to r={r} with a largest rank of {rho}, got {ranks}")
    return blocks


def check_complete(name: str, given: Mapping[str, Any]) -> None:
    """Raise unless every tensor of the layer `name` is given."""
    missing = [key for key in STATE_KEYS if given.get(key) is None]
    if missing:
        raise ValueError(f"{name}: the adapter lacks {', '.join(missing)}; nothing was loaded")


def _label_bits(num_blocks: int) -> int:
    return (num_blocks - 1).bit_length()
