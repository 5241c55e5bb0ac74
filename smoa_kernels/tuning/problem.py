"""`Problem`: one adapted layer and one batch, described by sizes alone, and how its blocks are padded."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..kernels.sizes import GRANULE, padded

__all__ = ["Problem"]


@dataclass(frozen=True)
class Problem:
    """One adapted linear layer and one batch.

    Attributes:
        tokens: T, rows of x.
        out_features: N.
        in_features: C.
        num_blocks: K.
        rank: r, the budget of all blocks together.
        dtype: of x, W0 and the factors.
        dropout: probability, 0 where dropout is off or the layer is evaluating.
        bias: the layer has one.
        granule: adjacent coordinates that stay together, a partition's `granularity`: the size of contiguous blocks
            where all are as large. Where they are not it is smaller, and more is counted than they cost.
    """

    tokens: int
    out_features: int
    in_features: int
    num_blocks: int
    rank: int
    dtype: torch.dtype = torch.bfloat16
    dropout: float = 0.0
    bias: bool = False
    granule: int = 1

    @property
    def max_rank(self) -> int:
        """ρ, the largest rank of a block under the even split."""
        return math.ceil(self.rank / self.num_blocks)

    @property
    def weight_elements(self) -> int:
        """N·C."""
        return self.out_features * self.in_features

    @property
    def unit_flops(self) -> int:
        """2·T·N·C, the operations of the base layer's GEMM."""
        return 2 * self.tokens * self.weight_elements

    def padded(self, features: int) -> int:
        """Width of the padded block-major layout of N or C coordinates that are cut evenly."""
        return padded(features, self.num_blocks)

    @property
    def in_place(self) -> bool:
        """Whether kernels read x and dY where they lie: N, C and all blocks consist of whole granules of `GRANULE`."""
        together = self.num_blocks == 1 or self.granule % GRANULE == 0
        return together and self.out_features % GRANULE == self.in_features % GRANULE == 0

    def gathers(self, features: int) -> bool:
        """Whether kernels read N or C coordinates from a copy in the padded block-major layout.

        Without dropout: its mask is applied to a copy of x, whatever the blocks are.
        """
        return not self.in_place and (self.num_blocks > 1 or self.padded(features) != features)
