"""The definition's test vectors (`data/vectors/*.npz`): float64 inputs, orders, ΔW, outputs and gradients.

The files keep each block's factors apart, in spectral order: row n of B_k belongs to the n-th row in the k-th chunk of
`row_order`, and likewise for columns of A_k. The package packs them, A (ρ, C) and B (N, ρ), in the layer's own
coordinates: `pack_A` and `pack_B`. A file without a rule for its blocks holds spectral ones; those vectors came from
elsewhere. The other vectors are the reference's results. The C code agrees with all of them.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from smoa_kernels import BlockPartition
from smoa_kernels.definition.block_rule import BlockRule

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

VECTOR_DIR = Path(__file__).parent / "data" / "vectors"


@dataclass(frozen=True, eq=False)
class Vector:
    """One case: N = out_features, C = in_features, K = num_blocks, T = tokens, ρ = max rank."""

    name: str
    weight: FloatArray  # (N, C)
    bias: FloatArray  # (N)
    row_score: FloatArray  # (N)
    col_score: FloatArray  # (C)
    row_order: IntArray  # (N)
    col_order: IntArray  # (C)
    row_block: IntArray  # (N)
    col_block: IntArray  # (C)
    ranks: IntArray  # (K)
    alpha: float
    num_blocks: int
    x: FloatArray  # (T, C)
    dy: FloatArray  # (T, N)
    y: FloatArray  # (T, N)
    delta_weight: FloatArray  # (N, C)
    dx: FloatArray  # (T, C)
    block_A: tuple[FloatArray, ...]  # K times (r_k, C_k)
    block_B: tuple[FloatArray, ...]  # K times (N_k, r_k)
    block_dA: tuple[FloatArray, ...]
    block_dB: tuple[FloatArray, ...]
    block_order: str = "spectral"
    granule: int = 1
    block_seed: int = 0

    @property
    def rule(self) -> BlockRule:
        """The rule that made the blocks."""
        return BlockRule(self.num_blocks, self.block_order, self.granule, self.block_seed)

    def partition(self, device: torch.device) -> BlockPartition:
        """The computed blocks; random ones come from their labels, because another torch version may draw others."""
        if self.block_order != "random":
            return self.rule.build(torch.from_numpy(self.weight).to(device))
        labels = (torch.from_numpy(labels).to(device) for labels in (self.row_block, self.col_block))
        return BlockPartition.from_labels(*labels, self.num_blocks)

    @property
    def scaling(self) -> float:
        """`alpha / r`, where r is the rank budget of all blocks together."""
        return self.alpha / int(self.ranks.sum())

    @property
    def max_rank(self) -> int:
        """ρ, the width of the packed factors."""
        return int(self.ranks.max())

    @functools.cached_property
    def A(self) -> FloatArray:
        """Packed (ρ, C)."""
        return self.pack_A(self.block_A)

    @functools.cached_property
    def B(self) -> FloatArray:
        """Packed (N, ρ)."""
        return self.pack_B(self.block_B)

    def pack_A(self, blocks: Sequence[FloatArray]) -> FloatArray:
        """K factors (r_k, C_k) to one (ρ, C), padding 0."""
        return _packed(blocks, self.col_order, self.col_block, self.max_rank)

    def pack_B(self, blocks: Sequence[FloatArray]) -> FloatArray:
        """K factors (N_k, r_k) to one (N, ρ), padding 0."""
        return _packed([block.T for block in blocks], self.row_order, self.row_block, self.max_rank).T


def _packed(blocks: Sequence[FloatArray], order: IntArray, labels: IntArray, max_rank: int) -> FloatArray:
    """Packs factors (r_k, size_k) into one (ρ, size); `order` gives the coordinates of their columns."""
    packed = np.zeros((max_rank, order.size))
    for k, block in enumerate(blocks):
        packed[: len(block), order[labels[order] == k]] = block
    return packed


def load_vector(path: Path) -> Vector:
    """Read one file."""
    with np.load(path, allow_pickle=False) as file:
        stored = dict(file)
    num_blocks = int(stored.pop("num_blocks"))
    block_A = tuple(stored.pop(f"A{k}") for k in range(num_blocks))
    block_B = tuple(stored.pop(f"B{k}") for k in range(num_blocks))
    made = {key: stored.pop(key).item() for key in ("block_order", "granule", "block_seed") if key in stored}
    # A file has no gradients for a block of rank 0; its empty factors have the right shape.
    block_dA = tuple(stored.pop(f"dA{k}", block_A[k]) for k in range(num_blocks))
    block_dB = tuple(stored.pop(f"dB{k}", block_B[k]) for k in range(num_blocks))
    return Vector(
        name=path.stem,
        alpha=float(stored.pop("alpha")),
        num_blocks=num_blocks,
        block_A=block_A,
        block_B=block_B,
        block_dA=block_dA,
        block_dB=block_dB,
        **made,
        **stored,
    )


@functools.cache
def all_vectors() -> tuple[Vector, ...]:
    """All files, by name. Use: `@pytest.mark.parametrize("vector", all_vectors(), ids=lambda v: v.name)`."""
    return tuple(load_vector(path) for path in sorted(VECTOR_DIR.glob("*.npz")))
