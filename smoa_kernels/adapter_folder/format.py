"""The format of an adapter's file: its tensors of each layer, and the row of bytes that holds blocks, ranks and sketch.

An entry of a safetensors file costs some 120 bytes of header, as much as the labels of a small layer, so these share
one (`smoa_blocks`, uint8, little-endian):

    uint32   K, the CRC-32 of all that follows, the rank of each block
    float16  the sketch of W0, 33 numbers
    bits     the block of each row, then of each column: ceil(log2 K) bits each, the lowest first

Zeros stand for blocks that are not loaded yet. For the fused weight of E experts, `smoa_A` (E, ρ, C) and `smoa_B`
(E, N, ρ) hold each expert's factors, and `smoa_blocks` has a row for each expert.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import MOST_BLOCKS, layout_of, naming
from ..definition.experts import ExpertBlocks
from ..definition.partition import BlockPartition
from ..definition.sketch import SKETCH_SIZE, sketch_distance, sketch_weight

# The files of an adapter's folder, as PEFT names them, and the prefix of every key in its weights.
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
# The methods' names in a configuration.
METHOD, HIRA = "SMOA", "HIRA"
# The tensors of a layer's adapter.
STATE_KEYS = ("smoa_A", "smoa_B", "smoa_blocks")


@dataclass
class LayerBlocks:
    """The data of a layer in an adapter's file, except its factors; of experts, of all of them.

    Attributes:
        row_block, col_block: the labels, (N,) and (C,); of experts (E, N) and (E, C).
        num_blocks: K.
        ranks: int32 (K,), of every expert.
        sketch: float32 (33,), of W0; (E, 33) of experts.
    """

    row_block: Tensor
    col_block: Tensor
    num_blocks: int
    ranks: Tensor
    sketch: Tensor

    @cached_property
    def partition(self) -> Any:
        """The `BlockPartition`; `ExpertBlocks` of experts. Checks of a file need none, and making it takes longer."""
        kind: Any = ExpertBlocks if self.of_experts else BlockPartition
        return kind.from_labels(self.row_block, self.col_block, self.num_blocks)

    @property
    def of_experts(self) -> bool:
        """Whether these are the blocks of a fused weight of experts."""
        return self.sketch.ndim == 2

    def matrices(self) -> list[LayerBlocks]:
        """One entry per matrix: this one, or one per expert."""
        if not self.of_experts:
            return [self]
        found = [
            LayerBlocks(rows, cols, self.num_blocks, self.ranks, sketch)
            for rows, cols, sketch in zip(self.row_block, self.col_block, self.sketch, strict=True)
        ]
        for blocks, partition in zip(found, self.partition.partitions(range(len(found))), strict=True):
            blocks.partition = partition  # experts may share it
        return found

    def orient(self, stored: Tensor) -> tuple[Tensor, float]:
        """Turn a base's stored matrix into W0 (N, C), and return its distance from the W0 that was trained over.

        A Conv1D stores W0ᵀ, and so do some classes of experts. Of a square matrix only the sketch shows whether it is
        transposed. A matrix of another shape has infinite distance.
        """
        ways = [way for way in (stored, stored.T) if tuple(way.shape) == self.partition.shape]
        if not ways:
            return stored, float("inf")
        distances = [sketch_distance(self.sketch, sketch_weight(way)) for way in ways]
        nearest = min(distances)
        return ways[distances.index(nearest)], nearest


def blocks_layout(out_features: int, in_features: int, num_blocks: int) -> np.dtype[Any]:
    """The bytes of `smoa_blocks` for a layer of this shape with K blocks."""
    size = -(-(out_features + in_features) * _label_bits(num_blocks) // 8)
    head: list[Any] = [("num_blocks", "<u4"), ("checksum", "<u4"), ("ranks", "<u4", (num_blocks,))]
    return np.dtype([*head, ("sketch", "<f2", (SKETCH_SIZE,)), ("labels", "u1", (size,))])


def pack_blocks(partition: BlockPartition, ranks: Tensor, sketch: Tensor) -> Tensor:
    """Pack the blocks, ranks and sketch of a matrix into uint8 on the CPU; a sketch beyond float16 becomes infinite."""
    labels = torch.cat([partition.row_block, partition.col_block]).cpu().numpy()
    bits = labels[:, None] >> np.arange(_label_bits(partition.num_blocks)) & 1
    row = np.zeros(1, blocks_layout(*partition.shape, partition.num_blocks))
    row["num_blocks"], row["ranks"], row["sketch"] = partition.num_blocks, ranks.cpu(), sketch.cpu()
    row["labels"] = np.packbits(bits.astype(np.uint8), bitorder="little")
    row["checksum"] = zlib.crc32(row.tobytes()[8:])
    return torch.from_numpy(row.view(np.uint8))


def unpack_blocks(packed: Tensor, out_features: int, in_features: int) -> LayerBlocks:
    """Unpack `smoa_blocks` of a layer of this shape, on the same device; the rows of all experts, maybe thousands,
    at once.
    """
    if packed.dtype != torch.uint8 or packed.ndim not in (1, 2):
        raise ValueError(
            f"smoa_blocks must be a vector of uint8, or have a row for each expert, got {packed.dtype} "
            f"{tuple(packed.shape)}"
        )
    data = np.atleast_2d(packed.detach().cpu().contiguous().numpy())
    name = "smoa_blocks" + " of expert {}" * (packed.ndim - 1)
    num_blocks = int(data[0, :4].view("<u4")[0]) if data.shape[1] >= 8 else 0
    possible = 1 <= num_blocks <= MOST_BLOCKS
    layout = blocks_layout(out_features, in_features, num_blocks) if possible else None
    if layout is None or data.shape[1] != layout.itemsize:
        raise ValueError(
            f"smoa_blocks must hold the block labels of {out_features} rows and {in_features} columns, got "
            f"{data.shape[1]} bytes that say num_blocks={num_blocks}"
        )
    found = data.view(layout)[:, 0]
    for expert, row in enumerate(found):
        if row["num_blocks"] != num_blocks or row["checksum"] != zlib.crc32(row.tobytes()[8:]):
            raise ValueError(
                f"{name.format(expert)} is corrupt: its labels, ranks and sketch do not match its checksum"
            )
    count, width = out_features + in_features, _label_bits(num_blocks)
    bits: Any = np.unpackbits(found["labels"], axis=1, count=count * width, bitorder="little")
    dtype = np.uint8 if num_blocks <= 256 else np.int32
    powers = (1 << np.arange(width)).astype(dtype)
    labels = bits.astype(dtype, copy=False).reshape(len(data), count, width) @ powers
    wrong = np.flatnonzero((labels >= num_blocks).any(1))
    if wrong.size:
        raise ValueError(f"{name.format(wrong[0])} must have labels below num_blocks={num_blocks}")
    rows, cols = torch.from_numpy(labels).to(packed.device).split([out_features, in_features], 1)
    rank = torch.from_numpy(found["ranks"].astype(np.int32)).to(packed.device)
    sketch = torch.from_numpy(found["sketch"].astype(np.float32)).to(packed.device)
    if packed.ndim == 1:
        return LayerBlocks(rows[0], cols[0], num_blocks, rank[0], sketch[0])
    other = (rank != rank[0]).any(1).nonzero()
    if len(other):
        raise ValueError(f"{name.format(int(other[0]))} has other ranks than those of expert 0")
    return LayerBlocks(rows, cols, num_blocks, rank[0], sketch)


def read_blocks(name: str, given: Mapping[str, Any], r: int) -> LayerBlocks:
    """Read blocks, ranks and sketch out of the tensors of one layer, after checking these against each other.

    Args:
        name: the layer's name, for messages.
        given: tensors by `STATE_KEYS`, None for one that is missing.
        r: the rank budget.
    """
    _check_complete(name, given)
    A, B, packed = (given[key] for key in STATE_KEYS)
    for key, factor in (("smoa_A", A), ("smoa_B", B)):
        if factor.ndim not in (2, 3) or not factor.is_floating_point():
            raise ValueError(
                f"{name}: {key} must be a matrix of floating-point numbers, got {factor.dtype} "
                f"{tuple(factor.shape)}; of experts, a stack of them"
            )
    stack = A.shape[:-2]
    if B.shape[:-2] != stack or packed.shape[:-1] != stack or 0 in stack:
        raise ValueError(
            f"{name}: smoa_A, smoa_B and smoa_blocks must be of as many experts, got {tuple(A.shape)}, "
            f"{tuple(B.shape)} and {tuple(packed.shape)}"
        )
    with naming(name):
        blocks = unpack_blocks(packed, B.shape[-2], A.shape[-1])
    ranks, rho = blocks.ranks.tolist(), A.shape[-2]
    if min(ranks) < 0 or max(ranks) != rho or rho != B.shape[-1] or sum(ranks) != r:
        raise ValueError(f"{name}: ranks must sum to r={r} with a largest rank of {rho}, got {ranks}")
    return blocks


def check_shapes(name: str, given: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise unless the tensors of the layer `name` are all given, dense and of these shapes."""
    _check_complete(name, given)
    for key, value in given.items():
        if not isinstance(value, Tensor) or layout_of(value) != "torch.strided":
            kind = layout_of(value) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}.{key} must be a dense tensor, got {kind}")
        if tuple(value.shape) != tuple(shapes[key]):
            raise ValueError(
                f"size mismatch for {name}.{key}: the layer takes shape {tuple(shapes[key])}, the adapter has "
                f"{tuple(value.shape)}"
            )


def _check_complete(name: str, given: Mapping[str, Any]) -> None:
    missing = [key for key in STATE_KEYS if given.get(key) is None]
    if missing:
        raise ValueError(f"{name}: the adapter lacks {', '.join(missing)}; nothing was loaded")


def _label_bits(num_blocks: int) -> int:
    return (num_blocks - 1).bit_length()
