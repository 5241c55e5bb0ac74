"""Groups: the columns of W0 that share a column of A, so that an update scales them by one number.

Groups are of `group_size` adjacent columns; the last may be short. Where `col_group` (C,) is given, column j is in
group `col_group[j]`, and the same holds for W0 with its columns sorted by group: the `g_idx` of a GPTQ checkpoint in
act-order is such a map. All that knows which columns are in a group is here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import granules
from .labels import check_labels


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
