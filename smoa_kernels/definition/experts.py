"""SMoA on the fused weight of a layer of experts: one formula for each expert (docs/definition.md).

    W_eff[e, i, j] = W0[e, i, j] · (1 + s · [b_e(i) = c_e(j)] · Σ_t B[e, i, t] A[e, t, j])

Each pair of a token and one of its experts is a row of x. Pairs are sorted by expert, as `torch`'s grouped GEMM wants
them, and `ends` says where the pairs of each expert end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .packed import PackedAdapter
from .partition import BlockPartition
from .reference import reference_linear

__all__ = ["ExpertBlocks", "ExpertsAdapter", "index_dtype", "reference_experts_linear"]


@dataclass(frozen=True)
class ExpertBlocks:
    """The aligned blocks of E weights of one shape (N, C), without a label for each coordinate.

    Block k of expert e holds the rows `row_index[e, row_offsets[e, k]:row_offsets[e, k + 1]]`, ascending, and likewise
    columns. Where the first dimension is 1, all experts share what it holds. A block may be empty.

    Attributes:
        row_offsets: int32 (E or 1, K + 1), where each block's rows start in `row_index`; the last is N.
        col_offsets: int32 (E or 1, K + 1), the same for columns.
        row_index: (E or 1, N), rows grouped by block, in the dtype of :func:`index_dtype`; None where every block of
            every expert is a slice of rows and of columns, in W0's own order.
        col_index: (E or 1, C), the same for columns; None where `row_index` is.
        granule: adjacent coordinates, from a multiple of it on, that every block keeps together, of rows and of
            columns: a partition's `granularity`. Kernels read 8 and more as vectors; 1 is always true.
    """

    row_offsets: Tensor
    col_offsets: Tensor
    row_index: Tensor | None = None
    col_index: Tensor | None = None
    granule: int = 1

    @property
    def num_blocks(self) -> int:
        """K."""
        return self.row_offsets.shape[1] - 1

    @property
    def is_contiguous(self) -> bool:
        """Whether every block is a slice of rows and of columns."""
        return self.row_index is None

    @property
    def T(self) -> ExpertBlocks:
        """The blocks of the transposed weights."""
        return ExpertBlocks(self.col_offsets, self.row_offsets, self.col_index, self.row_index, self.granule)

    def partition(self, expert: int) -> BlockPartition:
        """Make the partition of one expert's weight."""
        labels = (
            _labels(offsets[expert % len(offsets)], None if index is None else index[expert % len(index)])
            for offsets, index in ((self.row_offsets, self.row_index), (self.col_offsets, self.col_index))
        )
        return BlockPartition.from_labels(*labels, self.num_blocks)


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
        """The adapter of every expert's W_effᵀ, which computes `dX = dY W_eff` as this one computes `x W_effᵀ`."""
        return ExpertsAdapter(
            self.weight.transpose(1, 2),
            self.B.transpose(1, 2),
            self.A.transpose(1, 2),
            self.blocks.T,
            self.ranks,
            self.scaling,
        )

    def expert(self, expert: int) -> PackedAdapter:
        """The adapter of one expert's weight."""
        return PackedAdapter(
            self.weight[expert],
            self.A[expert],
            self.B[expert],
            self.blocks.partition(expert),
            self.ranks,
            self.scaling,
        )


def index_dtype(size: int) -> torch.dtype:
    """int16 where it counts all of `size` coordinates, else int32: the blocks of many experts are large."""
    return torch.int16 if size <= torch.iinfo(torch.int16).max else torch.int32


def reference_experts_linear(x: Tensor, ends: Tensor, adapter: ExpertsAdapter) -> Tensor:
    """Compute `y_p = x_p W_effᵀ` with the W_eff of pair p's expert, one expert after another; differentiable.

    Args:
        x: (P, C), sorted by expert, W0's dtype.
        ends: int (E,), how many pairs the experts up to each have together; the last is P.
        adapter: of the experts.

    Returns:
        y (P, N) in x's dtype.

    Example:
        >>> blocks = ExpertBlocks(*(torch.tensor([[0, 2, 4]], dtype=torch.int32),) * 2)
        >>> weight, A, B = torch.ones(2, 4, 4), torch.ones(2, 1, 4), torch.ones(2, 4, 1)
        >>> adapter = ExpertsAdapter(weight, A, B, blocks, torch.tensor([1, 1]).int(), torch.tensor(0.5))
        >>> reference_experts_linear(torch.ones(3, 4), torch.tensor([3, 3]), adapter)[0].tolist()
        [5.0, 5.0, 5.0, 5.0]
    """
    y, start = [x.new_empty(0, adapter.weight.shape[1])], 0
    for number, end in enumerate(ends.tolist()):
        if end > start:
            e = adapter.expert(number)
            rows = x[start:end]
            y.append(
                reference_linear(rows, e.weight, None, e.A, e.B, e.partition, e.ranks, scaling=e.scaling)
            )
        start = end
    return torch.cat(y)


def _labels(offsets: Tensor, index: Tensor | None) -> Tensor:
    """The block of each coordinate, of blocks that start at `offsets` of `index` (None: of the coordinates)."""
    blocks = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    labels = blocks.repeat_interleave(offsets.diff())
    return labels if index is None else torch.empty_like(labels).scatter_(0, index.long(), labels)
