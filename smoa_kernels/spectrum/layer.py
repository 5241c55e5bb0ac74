"""Measures an update of a layer: its singular values, and how it spreads over W0's singular directions.

W0 = U diag(σ) Vᵀ is the thin SVD, q = min(N, C), and an energy is a squared Frobenius norm. `e^H(p)` is the exponential
of the entropy of the shares p; it is n where n of the shares are equal and the rest are zero.

    left_j = ‖u_jᵀ ΔW‖² / ‖ΔW‖²          right_j = ‖ΔW v_j‖² / ‖ΔW‖²
    coverage       = √(e^H(left) · e^H(right)) / q,  left and right each over their sum
    effective rank = e^H(τ² / Σ τ²),  τ the singular values of ΔW

Coverage is the share of W0's directions that the update touches: 1 where its energy is equal on all of them. Effective
rank counts the directions that the update moves independently: at most r for LoRA, however many it touches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..definition.partition import BlockPartition

__all__ = [
    "BlockEnergies",
    "LayerSpectrum",
    "UpdateSpectrum",
    "cumulated",
    "effective_number",
    "layer_spectrum",
]


@dataclass(frozen=True)
class BlockEnergies:
    """How W0's energy is shared by the K blocks. Every tensor is float64.

    Attributes:
        row_shares: (K,) share of W0's energy in the rows of each block.
        col_shares: (K,) share of W0's energy in the columns of each block.
        diagonal_shares: (K,) share in `rows_k × cols_k`, the part of W0 that block k of an adapter changes.
        left: (K, q) share of left singular direction j in the rows of block k, `Σ_{i in rows_k} U_ij²`.
        right: (K, q) share of right singular direction j in the columns of block k.
    """

    row_shares: Tensor
    col_shares: Tensor
    diagonal_shares: Tensor
    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class UpdateSpectrum:
    """The measures of an update ΔW of one layer. Every tensor is float64.

    Attributes:
        singular_values: (q,) of ΔW, descending.
        left: (q,) share of ΔW's energy along each left singular direction of W0, `u_jᵀ ΔW`. The shares sum to 1
            where N ≤ C. Where N > C, the rest lies in directions that W0 never writes to.
        right: (q,) share of ΔW's energy along each right singular direction, `ΔW v_j`.
        rank: numerical rank, as `torch.linalg.matrix_rank` counts it.
        relative_norm: ‖ΔW‖ / ‖W0‖; infinite where W0 is zero and ΔW is not.
    """

    singular_values: Tensor
    left: Tensor
    right: Tensor
    rank: int
    relative_norm: float

    @property
    def effective_rank(self) -> float:
        """`e^H` of the shares of energy of the singular values; 0 for a zero update."""
        return effective_number(self.singular_values.square())

    @property
    def coverage(self) -> float:
        """Share of W0's directions that the update touches, from 0 (a zero update) to 1."""
        count = self.left.shape[0]
        return math.sqrt(effective_number(self.left) * effective_number(self.right)) / max(count, 1)


@dataclass(frozen=True)
class LayerSpectrum:
    """The measures of one layer: W0, its blocks, and its updates by name.

    Attributes:
        shape: (N, C).
        singular_values: float64 (q,) of W0, descending.
        rank: numerical rank of W0.
        blocks: how its blocks share its energy.
        updates: the measures of each update.
    """

    shape: tuple[int, int]
    singular_values: Tensor
    rank: int
    blocks: BlockEnergies
    updates: Mapping[str, UpdateSpectrum]

    @property
    def effective_rank(self) -> float:
        """`e^H` of the shares of energy of W0's singular values."""
        return effective_number(self.singular_values.square())


def layer_spectrum(weight: Tensor, partition: BlockPartition, updates: Mapping[str, Tensor]) -> LayerSpectrum:
    """Measure updates of one layer against its W0, in float64."""
    wide = weight.detach().double()
    U, sigma, Vh = torch.linalg.svd(wide, full_matrices=False)
    norm = float(torch.linalg.vector_norm(sigma))
    return LayerSpectrum(
        shape=partition.shape,
        singular_values=sigma,
        rank=_rank(sigma, partition.shape),
        blocks=_block_energies(wide, U, Vh, partition),
        updates={name: _update(delta.detach().double(), U, Vh, norm) for name, delta in updates.items()},
    )


def effective_number(energies: Tensor) -> float:
    """How many of the energies count: `exp(-Σ p log p)` with `p = energies / Σ energies`, 0 where all are zero."""
    total = energies.sum()
    return float(torch.special.entr(energies / total).sum().exp()) if total > 0 else 0.0


def cumulated(shares: Tensor, points: int = 101) -> list[float]:
    """Cumulated sums of the shares (q,) at `points` even positions from 0 to q, interpolated linearly."""
    sums = torch.nn.functional.pad(shares.double().cumsum(0), (1, 0))
    place = torch.linspace(0, len(shares), points, dtype=torch.float64)
    below = place.floor().long().clamp(max=max(len(shares) - 1, 0))
    above = (below + 1).clamp(max=len(shares))
    return torch.lerp(sums[below], sums[above], place - below).tolist()


def _update(delta: Tensor, U: Tensor, Vh: Tensor, weight_norm: float) -> UpdateSpectrum:
    energy = float(delta.square().sum()) or 1.0  # a zero update has shares of zero
    singular_values = torch.linalg.svdvals(delta)
    norm = float(torch.linalg.vector_norm(singular_values))
    return UpdateSpectrum(
        singular_values=singular_values,
        left=(U.T @ delta).square().sum(1) / energy,
        right=(delta @ Vh.T).square().sum(0) / energy,
        rank=_rank(singular_values, delta.shape),
        relative_norm=norm / weight_norm if weight_norm else (math.inf if norm else 0.0),
    )


def _block_energies(weight: Tensor, U: Tensor, Vh: Tensor, partition: BlockPartition) -> BlockEnergies:
    count = partition.num_blocks
    rows = torch.nn.functional.one_hot(partition.row_block.long(), count).double()
    cols = torch.nn.functional.one_hot(partition.col_block.long(), count).double()
    energy = weight.square()
    shares = rows.T @ energy @ cols / (float(energy.sum()) or 1.0)
    return BlockEnergies(
        row_shares=shares.sum(1),
        col_shares=shares.sum(0),
        diagonal_shares=shares.diagonal(),
        left=rows.T @ U.square(),
        right=(Vh.square() @ cols).T,
    )


def _rank(singular_values: Tensor, shape: Sequence[int]) -> int:
    if not singular_values.numel():
        return 0
    tolerance = singular_values[0] * max(shape) * torch.finfo(singular_values.dtype).eps
    return int((singular_values > tolerance).sum())
