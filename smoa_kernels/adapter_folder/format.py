"""The format of an adapter's folder: its files, and the tensors of each layer in the file of weights.

The tensors of a layer are those of an :class:`smoa_kernels.adapter.Adapter`, under `<layer's path>.smoa.<tensor>`:

    A (ρ, C), B (N, ρ)      the factors; ρ is the largest rank of a block. With a `group_size` g it has ⌈C / g⌉ columns
    row_block, col_block    the block of each row (N,) and column (C,), uint8, or int32 above 256 blocks
    ranks (K,)              the rank of each block, int32
    sketch (33,)            of the W0 that the adapter was trained on, float32
    scaling ()              s
    col_group (C,)          the group of each column, int32; only where groups are not of adjacent columns

For the fused weight of E experts, all but `ranks` and `scaling` have E as a further first dimension; `col_group` is for
single matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from ..adapter import ALL_KEYS, LABELS, STATE_KEYS, check_complete, check_values
from ..checks import check_dense, granules
from ..definition.experts import ExpertBlocks
from ..definition.labels import group_position, of_columns
from ..definition.packed import PackedAdapter
from ..definition.partition import BlockPartition
from ..definition.sketch import SKETCH_SIZE, sketch_distance, sketch_weight

# The files of an adapter's folder, as PEFT names them, the prefix of every key in its weights, and what stands between
# the path of a layer and the name of a tensor.
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
INFIX = ".smoa."
# The methods' names in a configuration.
METHOD, HIRA = "SMOA", "HIRA"


@dataclass
class StoredAdapter:
    """The adapter of a layer as a file holds it; of experts, of all of them. The first fields are `STATE_KEYS`."""

    A: Tensor
    B: Tensor
    row_block: Tensor
    col_block: Tensor
    ranks: Tensor
    sketch: Tensor  # NaN where the file has none
    scaling: Tensor
    group_size: int = 1
    col_group: Tensor | None = None

    @cached_property
    def partition(self) -> Any:
        """The `BlockPartition`; `ExpertBlocks` of experts. Checks of a file need none, and making it takes longer."""
        kind: Any = ExpertBlocks if self.of_experts else BlockPartition
        return kind.from_labels(self.row_block, self.col_block, len(self.ranks))

    @property
    def of_experts(self) -> bool:
        """Whether this is the adapter of a fused weight of experts."""
        return self.A.ndim == 3

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C) of W0; (E, N, C) of experts."""
        return (*self.B.shape[:-1], self.col_block.shape[-1])

    def tensors(self) -> dict[str, Tensor]:
        """By `ALL_KEYS`."""
        return {key: tensor for key in ALL_KEYS if (tensor := getattr(self, key)) is not None}

    @property
    def wide_A(self) -> Tensor:
        """A (ρ, C), with a column for each of W0's; of experts (E, ρ, C)."""
        return of_columns(self.A, self.group_size, self.shape[-1], group_position(self.col_group))

    def packed(self, weight: Tensor) -> PackedAdapter:
        """Pair the adapter of a single matrix with its W0."""
        ranks = self.ranks.tolist()
        return PackedAdapter(weight, self.wide_A, self.B, self.partition, self.ranks, self.scaling, ranks)

    def matrices(self) -> list[StoredAdapter]:
        """One entry per matrix: this part, or part per expert."""
        if not self.of_experts:
            return [self]
        stacked = [getattr(self, key) for key in ("A", "B", "row_block", "col_block", "sketch")]
        own = [
            replace(self, A=A, B=B, row_block=rows, col_block=cols, sketch=sketch)
            for A, B, rows, cols, sketch in zip(*stacked, strict=True)
        ]
        for part, partition in zip(own, self.partition.partitions(range(len(own))), strict=True):
            part.partition = partition  # experts may share it
        return own

    def orient(self, stored: Tensor) -> tuple[Tensor, float]:
        """Turn a base's stored matrix into W0 (N, C), and return its distance from the W0 of the training.

        A Conv1D stores W0ᵀ, and so do some classes of experts. Of a square matrix only the sketch shows whether it is
        transposed. A convolution's weight counts as a matrix. A matrix of another shape has infinite distance.
        """
        if stored.ndim > 2:
            stored = stored.flatten(1)
        ways = [way for way in (stored, stored.T) if tuple(way.shape) == self.shape]
        if not ways:
            return stored, float("inf")
        distances = [sketch_distance(self.sketch, sketch_weight(way)) for way in ways]
        nearest = min(distances)
        return ways[distances.index(nearest)], nearest


def read_layer(name: str, given: Mapping[str, Any], r: int, group_size: int = 1) -> StoredAdapter:
    """Make the adapter of a layer from its tensors by `ALL_KEYS`, None for one that is missing, checked.

    Raises:
        TypeError, ValueError: naming the layer and the tensor.
    """
    check_complete(name, given)
    for key in STATE_KEYS:
        check_dense(f"{name}.{key}", given[key], integer=key in LABELS)
    A, B, ranks = given["A"], given["B"], given["ranks"]
    if A.ndim not in (2, 3) or B.ndim != A.ndim or ranks.ndim != 1 or 0 in (*A.shape[:-2], len(ranks)):
        raise ValueError(
            f"{name}: A and B must be matrices, of experts stacks of them, and ranks a vector, got "
            f"{tuple(A.shape)}, {tuple(B.shape)} and {tuple(ranks.shape)}"
        )
    *stack, rows, rho = B.shape
    cols = given["col_block"].shape[-1] if given["col_block"].ndim else 0
    shapes = {
        "A": (*stack, rho, granules(cols, group_size)),
        "row_block": (*stack, rows),
        "col_block": (*stack, cols),
        "sketch": (*stack, SKETCH_SIZE),
        "scaling": (),
    }
    for key, shape in shapes.items():
        if tuple(given[key].shape) != shape:
            raise ValueError(
                f"{name}.{key} must have shape {shape} to fit B {tuple(B.shape)}, got {tuple(given[key].shape)}"
            )
    check_values(name, given, r, rho, group_size)
    return StoredAdapter(**{key: given[key] for key in ALL_KEYS if key in given}, group_size=group_size)
