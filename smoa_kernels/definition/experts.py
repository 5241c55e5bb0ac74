"""SMoA on the fused weight of a layer of experts: one formula for each expert (docs/definition.md).

    W_eff[e, i, j] = W0[e, i, j] · (1 + s · [b_e(i) = c_e(j)] · Σ_t B[e, i, t] A[e, t, j])

Each pair of a token and one of its experts is a row of x. Pairs are sorted by expert, as for torch's grouped GEMM, and
`ends` says where the pairs of each expert end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .labels import granularity, label_dtype
from .packed import PackedAdapter
from .partition import BlockPartition
from .spectral_order import one_thread


@dataclass(frozen=True)
class ExpertBlocks:
    """The aligned blocks of E weights of one shape (N, C), without a label for each coordinate.

    Block k of expert e holds the rows `row_index[e, row_offsets[e, k]:row_offsets[e, k + 1]]`, ascending, and its
    columns in the same way. If the first dimension is 1, all experts share that tensor. A block may be empty.

    Attributes:
        row_offsets: int32 (E or 1, K + 1), where each block's rows start in `row_index`; the last is N.
        col_offsets: int32 (E or 1, K + 1), the same for columns.
        row_index: (E or 1, N), rows grouped by block, in the dtype of :func:`index_dtype`; None where every block of
            every expert is a slice of rows and of columns, in W0's own order.
        col_index: (E or 1, C), the same for columns; None where `row_index` is.
        granule: every block consists of whole aligned groups of so many adjacent rows, or columns: a partition's
            `granularity`. Kernels read 8 and more as vectors; 1 always holds.
    """

    row_offsets: Tensor
    col_offsets: Tensor
    row_index: Tensor | None = None
    col_index: Tensor | None = None
    granule: int = 1

    @classmethod
    def from_labels(cls, row_block: Tensor, col_block: Tensor, num_blocks: int) -> ExpertBlocks:
        """Make the blocks of stored labels; labels that all experts share are kept once.

        Args:
            row_block: integers (E or 1, N), the block of each row, in [0, num_blocks).
            col_block: integers (E or 1, C), the same for columns, on the same device.
            num_blocks: K.
        """
        # torch would use several threads for tensors this small, which costs more than it saves.
        with one_thread():
            sides = [labels.cpu().to(label_dtype(num_blocks)) for labels in (row_block, col_block)]
            sides = [side[:1] if bool((side == side[:1]).all()) else side for side in sides]
            granule, device = granularity(sides), row_block.device
            offsets = [_offsets(side, num_blocks).to(device) for side in sides]
            if all(bool((side[:, 1:] >= side[:, :-1]).all()) for side in sides):
                return cls(offsets[0], offsets[1], granule=granule)
            index = (side.argsort(stable=True).to(index_dtype(side.shape[1])) for side in sides)
            rows, cols = (places.to(device) for places in index)
        return cls(offsets[0], offsets[1], rows, cols, granule)

    @property
    def num_blocks(self) -> int:
        """K."""
        return self.row_offsets.shape[1] - 1

    @property
    def device(self) -> torch.device:
        """Where the offsets live."""
        return self.row_offsets.device

    @property
    def is_contiguous(self) -> bool:
        """Whether every block is a slice of rows and of columns."""
        return self.row_index is None

    @property
    def T(self) -> ExpertBlocks:
        """The blocks of the transposed weights."""
        return ExpertBlocks(self.col_offsets, self.row_offsets, self.col_index, self.row_index, self.granule)

    def partitions(self, experts: Sequence[int]) -> list[BlockPartition]:
        """Make the partitions of some experts' weights; experts with shared blocks share a partition."""
        if not experts:
            return []
        rows = _sides(self.row_offsets, self.row_index, experts)
        cols = _sides(self.col_offsets, self.col_index, experts)
        partitions = []
        for e in range(max(len(rows), len(cols))):
            (row_tensors, row_sizes), (col_tensors, col_sizes) = rows[e % len(rows)], cols[e % len(cols)]
            tensors = [tensor for pair in zip(row_tensors, col_tensors, strict=True) for tensor in pair]
            sizes = [*row_sizes, *col_sizes, self.granule, self.is_contiguous]
            partitions.append(BlockPartition.from_tensors(tensors, sizes))
        return partitions * len(experts) if len(partitions) == 1 else partitions


def _offsets(labels: Tensor, num_blocks: int) -> Tensor:
    """int32 (rows, K + 1), where each row's blocks start: the number of labels below each block's."""
    sizes = torch.stack([row.bincount(minlength=num_blocks) for row in labels])
    return F.pad(sizes.cumsum(1), [1, 0]).int()


def _sides(
    offsets: Tensor, index: Tensor | None, experts: Sequence[int]
) -> list[tuple[tuple[Tensor, Tensor, Tensor], list[int]]]:
    """Labels, index and offsets of rows, or columns, and the blocks' sizes: of each expert, or one that all share."""
    size = int(offsets[0, -1])
    places = torch.arange(size, device=offsets.device)[None] if index is None else index
    offsets, places = (side if len(side) == 1 else side[list(experts)] for side in (offsets, places))
    places, sizes = places.long(), offsets.diff()
    known, num_blocks = sizes.tolist(), sizes.shape[1]
    blocks = torch.arange(num_blocks, device=offsets.device).to(label_dtype(num_blocks))
    runs = blocks.repeat(len(sizes)).repeat_interleave(sizes.flatten()).view(len(sizes), size)
    count = max(len(offsets), len(places))
    labels = runs.new_empty(count, size)
    labels.scatter_(1, places.expand(count, -1), runs.expand(count, -1))
    return [
        ((labels[e], places[e % len(places)], offsets[e % len(offsets)]), known[e % len(known)])
        for e in range(count)
    ]


@dataclass(frozen=True)
class ExpertsAdapter:
    """Everything that defines W_eff of E experts: W0, the factors, the blocks and the scaling.

    Attributes:
        weight: W0 (E, N, C), any strides; a weight that is stored as (E, C, N) enters as its transpose.
        A: (E, ρ, C).
        B: (E, N, ρ), A's dtype. Rows t ≥ r_k of a block are padding, as in a `PackedAdapter`.
        blocks: of W0's rows and columns.
        ranks: int32 (K,) rank r_k of each block, the same for all experts.
        scaling: 0-d tensor, s.
    """

    weight: Tensor
    A: Tensor
    B: Tensor
    blocks: ExpertBlocks
    ranks: Tensor
    scaling: Tensor

    @property
    def T(self) -> ExpertsAdapter:
        """The adapter of every expert's W_effᵀ, which computes `dX = dY W_eff` as `self` computes `x W_effᵀ`."""
        turned = self.weight.mT, self.B.mT, self.A.mT, self.blocks.T
        return ExpertsAdapter(*turned, self.ranks, self.scaling)

    def experts(self, experts: Sequence[int]) -> list[PackedAdapter]:
        """The adapters of some experts' weights."""
        ranks = self.ranks.clamp(0, self.A.shape[1]).tolist()
        return [
            PackedAdapter(self.weight[e], self.A[e], self.B[e], partition, self.ranks, self.scaling, ranks)
            for e, partition in zip(experts, self.blocks.partitions(experts), strict=True)
        ]


def index_dtype(size: int) -> torch.dtype:
    """int16 where it holds the last of `size` indices, else int32: the blocks of many experts are large."""
    return torch.int16 if size - 1 <= torch.iinfo(torch.int16).max else torch.int32


def reference_experts_linear(x: Tensor, ends: Tensor, adapter: ExpertsAdapter) -> Tensor:
    """Compute `y_p = x_p W_effᵀ` with the W_eff of pair p's expert, one expert after another; differentiable.

    Args:
        x: (P, C), sorted by expert, W0's dtype.
        ends: int (E,), where the pairs of each expert end; the last is P.
        adapter: of the experts.

    Returns:
        y (P, N) in x's dtype.
    """
    y, start = [x.new_empty(0, adapter.weight.shape[1])], 0
    for expert, end in zip(adapter.experts(range(len(adapter.weight))), ends.tolist(), strict=True):
        if end > start:
            y.append(reference.forward(x[start:end], None, expert, "auto", None))
        start = end
    return torch.cat(y)
