"""Merges adapters into quantised weights by their scales alone.

Each format here stores a weight as codes of a few bits, less a zero point where there is one, and a scale for each
group g(j) of a row's columns:

    W0[i, j] = scales[i, g(j)] · codes[i, j]

Where an adapter's multiplier m is equal for all columns of a group, `W_eff = W0 ∘ m` has the same codes and the scales
`scales[i, g] · m[i, g]`, rounded once, in half types by thresholds at the place (i, g). The format of the file and its
size stay; neither the quantiser's package nor a GPU is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapter import Adapter
from ..backends import eager
from ..checks import naming
from ..definition.labels import group_of_columns, of_groups
from ..definition.packed import PackedAdapter
from ..definition.partition import BlockPartition
from ..definition.sketch import TOLERANCE, sketch_distance, sketch_weight
from ..definition.thresholds import round_weight
from .format import StoredAdapter


class QuantizedWeight(NamedTuple):
    """A layer's weight, `W0[i, j] = scales[i, groups[j]] · codes[i, j]`.

    Attributes:
        codes: gives the codes, float32 (N, C), zero points subtracted.
        scales: (N, G) in the stored dtype; in float32 where that was quantised too.
        groups: int64 (C,), the group of each column.
        store: gives what a file holds for new scales (N, G), by the ends of its names; None for what it leaves out.
        orders: possible orders of rows: entry i of an order is the file's row of the model's row i. The order whose
            sketch is nearest to the adapter's is used.
    """

    codes: Callable[[], Tensor]
    scales: Tensor
    groups: Tensor
    store: Callable[[Tensor], dict[str, Tensor | None]]
    orders: Sequence[Any] = (slice(None),)

    def dequantize(self) -> Tensor:
        """W0 in float32, (N, C)."""
        with fitting():
            return self.codes().mul_(self.scales.float().index_select(1, self.groups))


class QuantizedLayer(NamedTuple):
    """A layer of a base: the stored names of its tensors, by their ends, and a function that reads its weight."""

    names: dict[str, str]
    read: Callable[[], QuantizedWeight]


class Rescaled(NamedTuple):
    """New scales (N, G); how many have another sign than the old ones, and how many left their type's range."""

    scales: Tensor
    flipped: int
    outside: int


class Rescaling(NamedTuple):
    """How an adapter changes a quantised layer.

    Attributes:
        name: of the weight in the model.
        layer: of the base.
        adapter: of the layer.
    """

    name: str
    layer: QuantizedLayer
    adapter: StoredAdapter

    def read(self) -> QuantizedWeight:
        """The weight; ValueError if its shape or its groups are not the adapter's."""
        with naming(self.name):
            weight = self.layer.read()
            shape = len(weight.scales), len(weight.groups)
            if shape != self.adapter.shape:
                raise ValueError(f"it has shape {shape} in the base, and {self.adapter.shape} in the adapter")
            matched_groups(weight, self._groups(weight))
        return weight

    def new_scales(self, weight: QuantizedWeight) -> Rescaled:
        """Those of W_eff; ValueError if the adapter was trained on another weight."""
        with naming(self.name):
            W0, orders = weight.dequantize(), weight.orders
            distances = [sketch_distance(self.adapter.sketch, sketch_weight(W0[order])) for order in orders]
            check_distance(min(distances))
            multiplier = torch.empty(len(W0), self.adapter.A.shape[1])
            # In the file's order of rows.
            multiplier[orders[distances.index(min(distances))]] = group_multiplier(self.adapter)
            return rescale(weight, multiplier, self._groups(weight))

    def stored(self, weight: QuantizedWeight, scales: Tensor) -> dict[str, Tensor | None]:
        """The tensors for these scales, by their stored names; None for one that the merged model lacks."""
        return {self.layer.names[end]: tensor for end, tensor in weight.store(scales).items()}

    def _groups(self, weight: QuantizedWeight) -> Tensor:
        return group_of_columns(len(weight.groups), self.adapter.group_size, self.adapter.col_group)


def group_multiplier(adapter: StoredAdapter | Adapter) -> Tensor:
    """`m = 1 + s BA` inside the blocks and 1 outside, float32 (N, G), a column for each group of the adapter."""
    cols = of_groups(adapter.col_block, adapter.group_size, adapter.col_group)
    partition = BlockPartition.from_labels(adapter.row_block, cols, len(adapter.ranks))
    ones = torch.ones(partition.shape, device=cols.device)
    packed = PackedAdapter(ones, adapter.A, adapter.B, partition, adapter.ranks, adapter.scaling)
    return eager.modulated_weight(packed)


def rescale(weight: QuantizedWeight, multiplier: Tensor, groups: Tensor) -> Rescaled:
    """Multiply the scales of a weight; one beyond the type's range becomes its largest number.

    Args:
        weight: of the base.
        multiplier: m, float32 (N, G'), a column for each group of the adapter.
        groups: int64 (C,), the adapter's group of each column.

    Raises:
        ValueError: a group of the base has columns of several groups of the adapter, or a new scale is not finite.
    """
    limits, scales = torch.finfo(weight.scales.dtype), weight.scales.float()
    multiplier = multiplier.index_select(1, matched_groups(weight, groups))
    exact = scales * multiplier
    if not bool(torch.isfinite(exact).all()):
        raise ValueError("the merged scales hold NaN or Inf")
    # A number below the smallest normal one has fewer bits.
    outside = (exact.abs() > limits.max) | ((exact.abs() < limits.tiny) & (scales.abs() >= limits.tiny))
    flipped = (multiplier < 0) & (scales != 0)
    rounded = round_weight(exact.clamp(limits.min, limits.max), weight.scales.dtype)
    return Rescaled(rounded, int(flipped.sum()), int(outside.sum()))


def matched_groups(weight: QuantizedWeight, groups: Tensor) -> Tensor:
    """The adapter's group of each group of the base; see :func:`rescale`."""
    mapped = torch.zeros(weight.scales.shape[1], dtype=torch.int64)
    mapped[weight.groups] = groups  # of several, any
    if not torch.equal(mapped[weight.groups], groups):
        raise ValueError(
            f"the adapter's groups are not the base's, which has {len(mapped)} scales for the {len(groups)} columns of "
            'a row: train the adapter with group_size="base"'
        )
    return mapped


def column_groups(cols: int, count: int, given: Tensor | None = None) -> Tensor:
    """The group of each of `cols` columns, int64: as `given`, otherwise `count` groups of adjacent columns."""
    if given is not None and len(given) == cols and given.min() >= 0:  # -1 is in maps that were never filled
        return given.long()
    if not 0 < count <= cols or cols % count or (given is not None and len(given) != cols):
        raise ValueError(f"{cols} columns are not {count} groups of one size")
    return torch.arange(cols) // (cols // count)


def check_distance(distance: float) -> None:
    """Refuse a base weight by its sketch's distance from that of the weight that was trained on."""
    if not distance <= TOLERANCE:
        raise ValueError(
            f"the adapter was trained on another base weight (it differs by about {distance:.0%}, the same base "
            f"in another precision by at most {TOLERANCE:.0%})"
        )


@contextmanager
def fitting() -> Iterator[None]:
    """Around the reading of tensors that may not belong together: a ValueError for all that this can raise."""
    try:
        yield
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"the tensors of a quantised layer do not fit each other: {error}") from error
