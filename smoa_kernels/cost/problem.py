"""`Problem`: one adapted layer and one batch, described by sizes alone, and how its blocks are padded."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

__all__ = ["Problem"]

# In the padded block-major layout each block's width is a multiple of the wide padding, which every shipped tile
# divides, or of the narrow one where no block is wider than that.
WIDE_PADDING, NARROW_PADDING = 128, 64


@functools.cache  # asked at every call of a layer
def padding_multiple(sizes: tuple[int, ...]) -> int:
    """The number to whose multiples blocks of these sizes are padded."""
    return WIDE_PADDING if max(sizes) > NARROW_PADDING else NARROW_PADDING


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
    """

    tokens: int
    out_features: int
    in_features: int
    num_blocks: int
    rank: int
    dtype: torch.dtype = torch.bfloat16
    dropout: float = 0.0
    bias: bool = False

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
        widest = math.ceil(features / self.num_blocks)
        multiple = padding_multiple((widest,))
        return self.num_blocks * math.ceil(widest / multiple) * multiple

    def gathers(self, features: int) -> bool:
        """Whether the block-major layout of N or C coordinates is a copy; one block that fills its tiles needs none."""
        return self.num_blocks > 1 or self.padded(features) != features
