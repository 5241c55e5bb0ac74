"""Labels of rows and columns, made, checked and packed with a partition's other tensors into one; groups of columns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_dense, granules


def label_dtype(num_blocks: int) -> torch.dtype:
    """uint8 where it fits, else int32: gloo and NCCL cannot send int16."""
    return torch.uint8 if num_blocks <= 256 else torch.int32


_ALIGNMENT = 16  # bytes, as Triton asks of a pointer that it reads vectors from


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def sections(shape: Sequence[int], num_blocks: int) -> list[tuple[torch.dtype, int]]:
    """The dtypes and sizes of :meth:`BlockPartition.tensors`."""
    labels, index = ([(dtype, size) for size in shape] for dtype in (label_dtype(num_blocks), torch.int64))
    return [*labels, *index, *[(torch.int32, num_blocks + 1)] * 2]


def pack(tensors: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
    """`BlockPartition.plan` of the tensors and sizes of a partition: int64 N, C, K and the sizes, then the tensors."""
    shape = [tensor.shape[0] for tensor in tensors[:2]]
    head = torch.tensor([*shape, len(numbers) // 2 - 1, *numbers], device=tensors[0].device)
    parts = [part.contiguous().view(torch.uint8) for part in (head, *tensors)]
    return torch.cat([F.pad(part, [0, _padded(len(part)) - len(part)]) for part in parts])


def unpack(plan: Tensor, shape: Sequence[int], sizes: Sequence[int]) -> tuple[list[Tensor], Sequence[int]]:
    """The tensors in a plan, views of it, and the sizes."""
    start, tensors = _padded(8 * (3 + len(sizes))), []
    for dtype, size in sections(shape, len(sizes) // 2 - 1):
        end = start + size * dtype.itemsize
        tensors.append(plan[start:end].view(dtype))
        start = _padded(end)
    return tensors, sizes


def labels_of(order: Tensor, num_blocks: int, granule: int, size: int) -> Tensor:
    """Labels of `size` coordinates: `torch.tensor_split` cuts the order of their granules into blocks."""
    labels = torch.empty_like(order)
    for block, chunk in enumerate(order.tensor_split(num_blocks)):
        labels[chunk] = block
    return labels.repeat_interleave(granule)[:size]


def granularity(sides: Sequence[Tensor]) -> int:
    """The greatest common divisor of the positions where labels (n,), or those of any expert (E, n), change."""
    stacks = [torch.atleast_2d(side) for side in sides]
    places = [(side[:, 1:] != side[:, :-1]).any(0).nonzero().flatten() + 1 for side in stacks]
    return math.gcd(*torch.cat(places).tolist()) or max(1, *(side.shape[1] for side in stacks))


def check_range(name: str, labels: Tensor, num_blocks: int) -> None:
    """Labels must lie in [0, num_blocks)."""
    if not labels.numel():
        return
    lowest, highest = (int(end) for end in labels.aminmax())
    if not 0 <= lowest <= highest < num_blocks:
        raise ValueError(
            f"{name} must lie in [0, {num_blocks}) for num_blocks={num_blocks}, "
            f"got labels from {lowest} to {highest}"
        )


def check_labels(name: str, labels: Tensor) -> None:
    """Labels must be a vector of integers that holds numbers."""
    check_dense(name, labels, integer=True)
    if labels.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {tuple(labels.shape)}")
    if labels.is_meta:
        raise ValueError(f"{name} must hold numbers, got a meta tensor")


# Groups. Columns of W0 in one group share a column of A, so an update multiplies each row of the group by one number.
# Without a map a group is `group_size` adjacent columns, and the last group may be shorter. With a map `col_group` (C,)
# column j is in group `col_group[j]`; groups then have these sizes too, but their columns may lie anywhere. The `g_idx`
# of a GPTQ checkpoint in act-order is such a map. Only the functions below know which columns a group has.


def group_order(col_group: Tensor) -> Tensor:
    """W0's columns sorted by group, int64 (C,)."""
    return col_group.argsort(stable=True)


def group_position(col_group: Tensor | None) -> Tensor | None:
    """Where `group_order` puts each column, int64 (C,); None where groups are of adjacent columns."""
    return None if col_group is None else group_order(col_group).argsort()


def group_of_columns(columns: int, group_size: int, col_group: Tensor | None = None) -> Tensor:
    """The group of each column, int64 (C,)."""
    return torch.arange(columns) // group_size if col_group is None else col_group.long()


def of_columns(A: Tensor, group_size: int, columns: int, position: Tensor | None = None) -> Tensor:
    """A (…, ρ, C) of an A (…, ρ, ⌈C / group_size⌉) that has a column for each group; `position` is `group_position`.

    It repeats, then permutes: so the gradient is a sum over each group in an order that no device changes.
    """
    if group_size > 1:
        A = A.repeat_interleave(min(group_size, columns), -1)[..., :columns]
    return A if position is None else A[..., position]


def of_groups(values: Tensor, group_size: int, col_group: Tensor | None = None) -> Tensor:
    """Of values (…, C) that are equal within each group, those of the groups, (…, ⌈C / group_size⌉)."""
    return (values if col_group is None else values[..., group_order(col_group)])[..., ::group_size]


def same_groups(first: Tensor | None, second: Tensor | None) -> bool:
    """Whether two maps `col_group` of as many columns agree."""
    if first is None or second is None:
        return first is second
    return bool((first.cpu() == second.cpu()).all())


def check_map(name: str, col_group: Tensor, shape: Sequence[int], group_size: int) -> None:
    """`col_group` must have this shape (C,), and put `group_size` columns into each group but the last."""
    check_labels(name, col_group)
    columns, fits = shape[-1], group_size > 1 and col_group.shape == tuple(shape)
    if not fits or not torch.equal(col_group.cpu().long().sort()[0], group_of_columns(columns, group_size)):
        raise ValueError(
            f"{name} must put {columns} columns into groups 0 to {granules(columns, group_size) - 1}, group_size="
            f"{group_size} into each but the last, got groups of other sizes in shape {tuple(col_group.shape)}"
        )


def check_groups(name: str, col_block: Tensor, group_size: int, col_group: Tensor | None = None) -> None:
    """Columns of a group must be in one block: they share a column of A."""
    if group_size > 1:
        groups, position = of_groups(col_block, group_size, col_group), group_position(col_group)
        if not torch.equal(of_columns(groups, group_size, col_block.shape[-1], position), col_block):
            end = "end at groups" if col_group is None else "consist of groups"
            raise ValueError(f"{name} must have blocks of columns that {end} of group_size={group_size}")
