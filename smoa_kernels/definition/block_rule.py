"""`BlockRule`: how a layer's rows and columns are put into blocks (docs/definition.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import (
    MOST_COORDINATES,
    Granule,
    check_blocks,
    check_choice,
    check_count,
    check_granule,
    granules,
    on_sides,
)
from .labels import group_order
from .partition import BlockPartition

BLOCK_ORDERS = ("spectral", "contiguous", "random", "shared")


class BlockRule(NamedTuple):
    """How to make a partition. It is used once; from then on only the stored labels count.

    Attributes:
        num_blocks: K.
        block_order: the order that is cut into blocks, one of `BLOCK_ORDERS`. "shared" is one spectral order for all
            experts of a fused weight; of a single weight it is that weight's own.
        granule: g, adjacent rows or columns that stay together.
        block_seed: of the draw, if the order is "random". Weights of one shape get the same blocks.
        group_size: adjacent columns that share their entries of A; blocks of columns end at such groups.
    """

    num_blocks: int
    block_order: str = "spectral"
    granule: int = 1
    block_seed: int = 0
    group_size: int = 1

    @property
    def granules(self) -> Granule:
        """How many rows, and how many columns, stay together."""
        if self.group_size == 1:
            return self.granule
        return self.granule, min(math.lcm(self.granule, self.group_size), MOST_COORDINATES)

    @property
    def needs_weight(self) -> bool:
        """Whether blocks depend on W0's values, not only on its shape."""
        return self.num_blocks > 1 and self.block_order in ("spectral", "shared")

    def check(self, shape: Sequence[int] | None = None, name: str = "a weight") -> None:
        """Check all attributes and, if a shape is given, that `name` can be cut into such blocks."""
        check_blocks(self.num_blocks, shape, name)
        check_choice("block_order", self.block_order, BLOCK_ORDERS)
        check_count("group_size", self.group_size, most=MOST_COORDINATES)
        # No pair, which a partition takes: no file holds one.
        check_count("granule", self.granule, most=MOST_COORDINATES)
        check_granule(self.granule, self.num_blocks, shape, name)
        if shape is not None and granules(shape[1], on_sides(self.granules, shape)[1]) < self.num_blocks:
            raise ValueError(
                f"group_size must leave at least num_blocks={self.num_blocks} groups of the {shape[1]} columns of "
                f"{name}, got group_size={self.group_size}; num_blocks=1 takes any"
            )
        check_count("block_seed", self.block_seed, 0, 2**63 - 1)

    def build(self, weight: Tensor, col_group: Tensor | None = None) -> BlockPartition:
        """Compute the blocks of a weight, on its device; of a meta weight only the shape is read.

        Where `col_group` gives the group of each column (`labels.py`), they are those of W0 with its columns in the
        order of their groups.
        """
        if not self.needs_weight:
            return self.of_shape(weight.shape, "cpu" if weight.is_meta else weight.device, col_group)
        if col_group is not None:
            order = group_order(col_group)
            return self.build(weight[:, order]).shard(col_slice=order.argsort())
        return BlockPartition.from_weight(weight, self.num_blocks, granule=self.granules)

    def of_shape(
        self, shape: Sequence[int], device: torch.device | str, col_group: Tensor | None = None
    ) -> BlockPartition:
        """Compute the blocks of any weight of a shape; for orders that need no weight."""
        if col_group is not None:
            return self.of_shape(shape, device).shard(col_slice=group_order(col_group).argsort())
        self.check(shape)
        if self.block_order == "random":
            return BlockPartition.random(
                shape, self.num_blocks, granule=self.granules, seed=self.block_seed, device=device
            )
        return BlockPartition.contiguous(shape, self.num_blocks, granule=self.granules, device=device)
