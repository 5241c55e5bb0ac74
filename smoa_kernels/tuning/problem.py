"""A layer and a batch, by their sizes, for the tuner."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ..kernels.spec import GRANULE


@dataclass(frozen=True)
class Problem:
    """One adapted linear layer and one batch.

    Attributes:
        tokens: T, rows of x.
        out_features: N.
        in_features: C.
        num_blocks: K.
        rank: r, the budget of all blocks together.
        precision: of x and W0, one of `precision.PRECISIONS`.
        granule: adjacent coordinates that stay together, a partition's `granularity`: the size of contiguous blocks if
            all are equal. If they are not it is smaller.
        experts: E, of a layer of experts, whose tokens are pairs of token and expert; 0 for one weight.
        factors: precision of A and B; PEFT keeps them in float32.
    """

    tokens: int
    out_features: int
    in_features: int
    num_blocks: int
    rank: int
    precision: str = "bf16"
    granule: int = 1
    experts: int = 0
    factors: str = "fp32"

    @property
    def features(self) -> tuple[int, int]:
        """N and C."""
        return self.out_features, self.in_features

    @property
    def max_rank(self) -> int:
        """ρ, the largest rank of a block under the even split."""
        return math.ceil(self.rank / self.num_blocks)

    @property
    def in_granules(self) -> bool:
        """Whether N, C and all blocks consist of whole granules of `GRANULE`, which kernels read as one."""
        together = self.num_blocks == 1 or self.granule % GRANULE == 0
        return together and self.out_features % GRANULE == self.in_features % GRANULE == 0

    @property
    def in_place(self) -> bool:
        """Whether x and dY are multiplied where they lie: blocks are slices of one size."""
        (rows, short), (cols, narrow) = (divmod(n, self.num_blocks) for n in self.features)
        return self.num_blocks == 1 or (not short and not narrow and 1 < self.granule == math.gcd(rows, cols))


def parse_shape(text: str) -> tuple[int, int]:
    """ "NxC" to (N, C)."""
    match = re.fullmatch(r"0*([1-9]\d{0,8})[x×]0*([1-9]\d{0,8})", text)
    if match is None:
        raise ValueError(
            f"--shape must be OUTxIN, two numbers from 1 to 999999999, for example 4096x14336, got {text!r}"
        )
    return int(match[1]), int(match[2])
