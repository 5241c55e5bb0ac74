"""Aligned blocks of a weight matrix (docs/definition.md).

A `BlockPartition` says which block each row and each column of W0 belongs to. It is computed once, from the
spectrum of W0 or from its shape alone. From then on it is stored and sent as labels: two small integer vectors. It is
never recomputed, since another machine could put a coordinate into another block and silently corrupt an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..checks import (
    MOST_COORDINATES,
    Granule,
    check_blocks,
    check_count,
    check_granule,
    check_weight,
    granules,
    on_sides,
)
from .labels import check_labels, check_range, granularity, label_dtype, labels_of, pack, sections, unpack
from .spectral_order import gather_weight, order_source


@dataclass(kw_only=True, eq=False, repr=False)
class BlockPartition:
    """K aligned blocks of a weight W0 (N, C), of its N rows (outputs) and C columns (inputs).

    Build one with :meth:`from_weight` (from the spectrum), :meth:`contiguous` or :meth:`random` (from a shape), or
    :meth:`from_labels` (from stored labels). All tensors live on one device. No method changes an instance. Two
    partitions are equal if their labels are; they cannot be hashed.

    A granule is a run of g adjacent rows or columns that stay together; the last one may be short.

    Attributes:
        row_block: (N,) block of each row, uint8, or int32 above 256 blocks.
        col_block: (C,) block of each column, same dtypes.
        row_index: int64 (N,), rows grouped by block, ascending within each. It depends on nothing but the labels,
            so a loaded adapter computes the same bits as the saved one.
        col_index: int64 (C,), the same for columns.
        row_offsets: int32 (K + 1,), where each block starts in `row_index`.
        col_offsets: int32 (K + 1,), where each block starts in `col_index`.
        row_sizes: rows per block, K numbers known on the host; a block may be empty.
        col_sizes: columns per block.
        granularity: the largest g such that the labels of rows and of columns change at multiples of g only; max(N, C)
            if they never change.
        is_contiguous: whether every block is a slice of rows and of columns, in W0's own order.

    Example:
        >>> weight = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
        >>> partition = BlockPartition.from_weight(weight, num_blocks=2)
        >>> partition.row_block.tolist(), partition.col_block.tolist()
        ([0, 0, 1, 1], [0, 0, 1, 1])
    """

    row_block: Tensor
    col_block: Tensor
    row_index: Tensor
    col_index: Tensor
    row_offsets: Tensor
    col_offsets: Tensor
    row_sizes: tuple[int, ...]
    col_sizes: tuple[int, ...]
    granularity: int
    is_contiguous: bool
    _plan = cast(Any, None)  # of an instance; no field

    @classmethod
    def from_weight(cls, weight: Tensor, num_blocks: int, *, granule: Granule = 1) -> BlockPartition:
        """Compute the spectral order of `weight` and cut it into `num_blocks` aligned blocks.

        The order is that of SMoA (arXiv 2605.21147), by the centroids of equation (1) of docs/definition.md.

        Args:
            weight: (N, C) floating point, any device. Half types are computed in float32.
            num_blocks: K, from 1 to min(N, C).
            granule: g, rows or columns that are sorted as one; or a number of rows, and one of columns.

        Raises:
            TypeError: `weight` is not a dense floating-point tensor, or `num_blocks` or `granule` is not an int.
            ValueError: `weight` is not a matrix or holds NaN or Inf; `num_blocks` is out of range, or exceeds the
                number of granules.
        """
        weight = gather_weight(weight)
        check_weight(weight)
        orders = partial(order_source.get(), weight.detach())
        return cls._cut(orders, weight.shape, num_blocks, granule)

    @classmethod
    def from_experts(cls, weights: Tensor, num_blocks: int, *, granule: Granule = 1) -> BlockPartition:
        """Compute one partition for many weights, from the spectrum of their mean Gram matrix (docs/definition.md).

        Args:
            weights: (E, N, C) floating point, any device.
            num_blocks: K, from 1 to min(N, C).
            granule: g, rows or columns that are sorted as one; or a number of rows, and one of columns.

        Raises:
            TypeError, ValueError: as :meth:`from_weight` does.

        Example:
            >>> weights = torch.tensor([[1.0, 3.0, 0.0], [0.0, 0.0, 9.0]]).diag_embed()
            >>> BlockPartition.from_experts(weights, num_blocks=3).row_block.tolist()
            [2, 1, 0]
        """
        weights = gather_weight(weights)
        check_weight(weights.flatten(0, 1), "weights")
        orders = partial(order_source.get(), weights.detach())
        return cls._cut(orders, weights.shape[-2:], num_blocks, granule)

    @classmethod
    def _cut(
        cls,
        orders: Callable[[tuple[int, int]], Iterable[Tensor]],
        shape: Sequence[int],
        num_blocks: int,
        granule: Granule,
        device: torch.device | str | None = None,
    ) -> BlockPartition:
        """Blocks of rows and columns; `orders` gives the orders of their granules, from the granules' sizes."""
        check_blocks(num_blocks, shape)
        check_granule(granule, num_blocks, shape)
        granule = on_sides(granule, shape)
        sides = zip(orders(granule), granule, shape, strict=True)
        rows, cols = (labels_of(order, num_blocks, g, size).to(device) for order, g, size in sides)
        return cls.from_labels(rows, cols, num_blocks)

    @classmethod
    def contiguous(
        cls,
        shape: Sequence[int],
        num_blocks: int,
        *,
        granule: Granule = 1,
        device: torch.device | str | None = None,
    ) -> BlockPartition:
        """Cut rows and columns in their own order. No weight is needed.

        Args:
            shape: (N, C).
            num_blocks: K, from 1 to min(N, C).
            granule: g, cuts are at multiples of it.
            device: of the labels.

        Raises:
            TypeError, ValueError: as :meth:`from_weight` does.

        Example:
            >>> BlockPartition.contiguous((4, 6), 2).col_block.tolist()
            [0, 0, 0, 1, 1, 1]
        """
        order_of = partial(torch.arange, device="cpu")
        return cls._of_shape(order_of, shape, num_blocks, granule, device or torch.get_default_device())

    @classmethod
    def random(
        cls,
        shape: Sequence[int],
        num_blocks: int,
        *,
        granule: Granule = 1,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> BlockPartition:
        """Cut rows and columns in an order drawn by a seed. No weight is needed.

        Args:
            shape: (N, C).
            num_blocks: K, from 1 to min(N, C).
            granule: g, rows or columns that stay together.
            seed: of the draw. Other releases of torch may draw other blocks, so labels are stored, never drawn again.
            device: of the labels.

        Raises:
            TypeError, ValueError: as :meth:`from_weight` does; `seed` is no int, or negative.

        Example:
            >>> BlockPartition.random((4, 6), 2, granule=2, seed=1).granularity
            2
        """
        check_count("seed", seed, 0, 2**63 - 1)
        draw = partial(torch.randperm, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
        return cls._of_shape(draw, shape, num_blocks, granule, device or torch.get_default_device())

    @classmethod
    def _of_shape(cls, order_of: Callable[[int], Tensor], shape: Sequence[int], *cut: Any) -> BlockPartition:
        """Blocks of rows and columns; `order_of` gives the order of their granules, from their number."""
        if len(shape) != 2:
            raise ValueError(f"shape must be (out_features, in_features), got {tuple(shape)}")
        for name, size in zip(("out_features", "in_features"), shape, strict=True):
            check_count(name, size, 0, MOST_COORDINATES)
        return cls._cut(lambda granule: map(order_of, map(granules, shape, granule)), shape, *cut)

    @classmethod
    def from_labels(cls, row_block: Tensor, col_block: Tensor, num_blocks: int) -> BlockPartition:
        """Rebuild a partition from stored labels. No spectrum is computed; blocks may be empty.

        Args:
            row_block: (N,) integer block of each row, in [0, num_blocks).
            col_block: (C,) integer block of each column, on the same device.
            num_blocks: K, at least 1. It cannot be inferred: blocks may be empty.

        Raises:
            TypeError: the labels are not dense integer tensors.
            ValueError: the labels are not vectors, out of range, or on two devices.
        """
        check_blocks(num_blocks)
        check_labels("row_block", row_block)
        check_labels("col_block", col_block)
        if row_block.device != col_block.device:
            raise ValueError(
                "row_block and col_block must be on one device, "
                f"got {row_block.device} and {col_block.device}"
            )
        # int64, because torch can do little with uint16, uint32 and uint64 but convert them. One copy for both, and one
        # back, so that the host waits for a GPU only once.
        both = torch.cat([row_block.long(), col_block.long()]).cpu()
        sides = both.split([row_block.shape[0], col_block.shape[0]])
        check_range("row_block", sides[0], num_blocks)
        check_range("col_block", sides[1], num_blocks)
        labels = [side.to(label_dtype(num_blocks)) for side in sides]
        index = [torch.argsort(side, stable=True) for side in labels]
        sizes = [torch.bincount(side, minlength=num_blocks).tolist() for side in sides]
        offsets = [torch.tensor([0, *accumulate(side)], dtype=torch.int32, device="cpu") for side in sizes]
        is_contiguous = all(bool((side[1:] >= side[:-1]).all()) for side in sides)
        numbers = [*sizes[0], *sizes[1], granularity(sides), is_contiguous]
        plan = pack([*labels, *index, *offsets], numbers).to(row_block.device)
        return cls._of_plan(plan, [len(side) for side in sides], numbers)

    @classmethod
    def from_plan(cls, plan: Tensor) -> BlockPartition:
        """Find the partition that has this very tensor as its :attr:`plan`, or read one from it.

        A plan that comes from elsewhere, such as an exported program, is read once. Reading waits for a GPU.
        """
        known = _of_plans.get(id(plan))
        if known is not None and known._plan is plan:
            return known
        known = getattr(plan, "smoa_partition", None)
        if known is None:
            head = plan.cpu().view(torch.int64)
            N, C, num_blocks = head[:3].tolist()
            known = cls.from_tensors(*unpack(plan, [N, C], head[3 : 2 * num_blocks + 5].tolist()))
            plan.smoa_partition = known  # type: ignore[attr-defined]
        return known

    @property
    def plan(self) -> Tensor:
        """Sizes, labels, indices and offsets in one tensor, uint8, which operators take."""
        if self._plan is None:
            kinds = [dtype for dtype, _ in sections(self.shape, self.num_blocks)]
            tensors = [tensor.to(dtype) for tensor, dtype in zip(self.tensors(), kinds, strict=True)]
            self._keep(pack(tensors, self.sizes()))
        return cast(Tensor, self._plan)

    def _keep(self, plan: Tensor) -> BlockPartition:
        """Let :meth:`from_plan` find the partition; returns itself."""
        self._plan, _of_plans[id(plan)] = plan, self
        return self

    @classmethod
    def _of_plan(cls, plan: Tensor, shape: Sequence[int], sizes: Sequence[int]) -> BlockPartition:
        return cls.from_tensors(*unpack(plan, shape, sizes))._keep(plan)

    def __reduce__(self) -> tuple[Any, ...]:  # torch.save refuses views of one memory in several dtypes
        return BlockPartition._of_plan, (self.plan, self.shape, self.sizes())

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor], sizes: Sequence[int]) -> BlockPartition:
        """Rebuild a partition from :meth:`tensors` and :meth:`sizes`."""
        num_blocks = len(sizes) // 2 - 1
        if len(tensors) != 6 or len(sizes) % 2 or tensors[-1].shape[0] != num_blocks + 1:
            raise ValueError(
                f"a partition is 6 tensors and 2K + 2 sizes, got {len(tensors)} and {len(sizes)}"
            )
        names = "row_block", "col_block", "row_index", "col_index", "row_offsets", "col_offsets"
        return cls(
            **dict(zip(names, tensors, strict=True)),
            row_sizes=tuple(sizes[:num_blocks]),
            col_sizes=tuple(sizes[num_blocks:-2]),
            granularity=sizes[-2],
            is_contiguous=bool(sizes[-1]),
        )

    def tensors(self) -> list[Tensor]:
        """Labels, indices and offsets, rows before columns."""
        labels, indices = (self.row_block, self.col_block), (self.row_index, self.col_index)
        return [*labels, *indices, self.row_offsets, self.col_offsets]

    def sizes(self) -> list[int]:
        """Rows of each block, columns of each, granularity, and 1 for contiguous blocks: 2K + 2 numbers."""
        return [*self.row_sizes, *self.col_sizes, self.granularity, int(self.is_contiguous)]

    @property
    def num_blocks(self) -> int:
        """K."""
        return len(self.row_sizes)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, C) of the weight that the partition was made for."""
        return self.row_block.shape[0], self.col_block.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the labels live."""
        return self.row_block.device

    @property
    def is_even(self) -> bool:
        """Whether blocks are slices of one size, which a matrix of W0's shape holds as a batch."""
        return self.is_contiguous and len(set(self.row_sizes)) == len(set(self.col_sizes)) == 1

    def rows(self, block: int) -> Tensor:
        """Rows of one block, ascending."""
        return torch.split(self.row_index, list(self.row_sizes))[block]

    def cols(self, block: int) -> Tensor:
        """Columns of one block, ascending."""
        return torch.split(self.col_index, list(self.col_sizes))[block]

    def shard(
        self, row_slice: slice = slice(None), col_slice: slice | Tensor = slice(None)
    ) -> BlockPartition:
        """Partition of `weight[row_slice, col_slice]` by the labels of its rows and columns; blocks may get empty."""
        return BlockPartition.from_labels(
            self.row_block[row_slice], self.col_block[col_slice], self.num_blocks
        )

    @cached_property
    def T(self) -> BlockPartition:
        """Partition of the transposed weight."""
        tensors = self.tensors()
        swapped = [tensor for pair in zip(tensors[1::2], tensors[::2], strict=True) for tensor in pair]
        sizes = [*self.col_sizes, *self.row_sizes, self.granularity, self.is_contiguous]
        return BlockPartition.from_tensors(swapped, sizes)

    def to(self, device: torch.device | str) -> BlockPartition:
        """The same partition on another device."""
        if self.device == torch.device(device):
            return self
        return BlockPartition._of_plan(self.plan.to(device), self.shape, self.sizes())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockPartition):
            return NotImplemented
        return (
            self.shape == other.shape
            and self.num_blocks == other.num_blocks
            and torch.equal(self.row_block.cpu(), other.row_block.cpu())
            and torch.equal(self.col_block.cpu(), other.col_block.cpu())
        )

    __hash__ = None  # type: ignore[assignment]  # equality compares tensors, which have no stable hash

    def __repr__(self) -> str:
        return (
            f"BlockPartition(shape={self.shape}, num_blocks={self.num_blocks}, row_sizes={self.row_sizes}, "
            f"col_sizes={self.col_sizes}, device={str(self.device)!r})"
        )


_of_plans: WeakValueDictionary[int, BlockPartition] = WeakValueDictionary()  # by id(plan)
