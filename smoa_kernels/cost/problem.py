"""One adapted layer and one batch, as the cost model and the launchers name them, and what its blocks are padded to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..checks import MOST_SIZE, check_blocks, check_count, check_number

__all__ = ["Problem"]

# The padded block-major layout: every shipped tile divides the wide padding, and blocks too small for it take the
# narrow one.
WIDE_PADDING, NARROW_PADDING = 128, 64


def padding_multiple(sizes: Sequence[int]) -> int:
    """What the widths of blocks of these sizes are rounded up to."""
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

    Raises:
        TypeError: a size that is no int, a probability that is no number, a dtype that is none.
        ValueError: a size or probability out of range, or a dtype that is not floating point.

    Example:
        >>> problem = Problem(8192, 4096, 4096, num_blocks=4, rank=16)
        >>> problem.max_rank, problem.unit_flops
        (4, 274877906944)
    """

    tokens: int
    out_features: int
    in_features: int
    num_blocks: int
    rank: int
    dtype: torch.dtype = torch.bfloat16
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, least in {"tokens": 0, "out_features": 1, "in_features": 1, "rank": 0}.items():
            check_count(name, getattr(self, name), least, MOST_SIZE)
        check_blocks(self.num_blocks)
        check_number("dropout", self.dropout)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not isinstance(self.dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, got {self.dtype!r}")
        if not self.dtype.is_floating_point:
            raise ValueError(f"dtype must be floating point, got {self.dtype}")

    @property
    def max_rank(self) -> int:
        """ρ, the rank of the largest block under the default split."""
        return math.ceil(self.rank / self.num_blocks)

    @property
    def weight_elements(self) -> int:
        """N·C."""
        return self.out_features * self.in_features

    @property
    def unit_flops(self) -> int:
        """2·T·N·C, one base GEMM."""
        return 2 * self.tokens * self.weight_elements

    def padded(self, features: int) -> int:
        """Width of the padded block-major layout of `features` evenly cut coordinates.

        Args:
            features: N or C.

        Raises:
            TypeError, ValueError: no number of features.
        """
        check_count("features", features, 1, MOST_SIZE)
        widest = math.ceil(features / self.num_blocks)
        multiple = padding_multiple((widest,))
        return self.num_blocks * math.ceil(widest / multiple) * multiple

    def gathers(self, features: int) -> bool:
        """Whether the block-major layout is a copy: one block that fills its tiles is its own.

        Args:
            features: N or C.
        """
        return self.num_blocks > 1 or self.padded(features) != features
