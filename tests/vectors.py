"""The definition's test vectors (`data/vectors/*.npz`): float64 inputs, orders, ΔW, outputs and gradients.

The files keep each block's factors apart, in spectral order: row n of B_k belongs to the n-th row in the k-th chunk of
`row_order`, column n of A_k to the n-th column in that of `col_order`. The package packs them, A (ρ, C) and B (N, ρ),
in the layer's own coordinates. A file without a rule for its blocks has spectral blocks; its vectors come from another
implementation. The other vectors are the reference's results. The C code agrees with all of them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from problems import LinearProblem
from torch import Tensor

from smoa_kernels import BlockPartition
from smoa_kernels.definition.block_rule import BlockRule

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

VECTOR_DIR = Path(__file__).parent / "data" / "vectors"


@dataclass(frozen=True, eq=False)
class Vector:
    """One case: N = out_features, C = in_features.

    Attributes:
        name: of the file.
        rule: that made the blocks.
        problem: the inputs, on the CPU, with blocks from the stored labels.
        expected: ΔW, y, dX, dA and dB.
        row_score, col_score: the spectral centroids (N) and (C).
        row_order, col_order: the coordinates, block after block.
    """

    name: str
    rule: BlockRule
    problem: LinearProblem
    expected: tuple[Tensor, ...]
    row_score: FloatArray
    col_score: FloatArray
    row_order: IntArray
    col_order: IntArray

    def partition(self, device: torch.device) -> BlockPartition:
        """The computed blocks; random ones come from their labels, because another torch version may draw others."""
        if self.rule.block_order == "random":
            return self.problem.partition.to(device)
        return self.rule.build(self.problem.weight.to(device))


def packed(file: dict[str, np.ndarray], name: str, side: str) -> Tensor:
    """The blocks `name` 0 to K of a file as one factor (ρ, size), or (size, ρ) for B's; padding is 0.

    A file has no gradients for a block of rank 0.
    """
    labels, order, ranks = file[f"{side}_block"], file[f"{side}_order"], file["ranks"]
    found = np.zeros((ranks.max(), order.size))
    for k, rank in enumerate(ranks):
        block = file.get(f"{name}{k}", np.zeros((0, 0)))
        if block.size:
            found[:rank, order[labels[order] == k]] = block if side == "col" else block.T
    return torch.from_numpy(found if side == "col" else found.T)


def load_vector(path: Path) -> Vector:
    """Read one file."""
    with np.load(path, allow_pickle=False) as stored:
        file = dict(stored)
    made = {name: file[name].item() for name in ("block_order", "granule", "block_seed") if name in file}
    num_blocks, ranks = int(file["num_blocks"]), file["ranks"]
    given = {name: torch.from_numpy(file[name]) for name in ("x", "weight", "bias", "dy")}
    labels = (torch.from_numpy(file[f"{side}_block"]) for side in ("row", "col"))
    problem = LinearProblem(
        **given,
        A=packed(file, "A", "col"),
        B=packed(file, "B", "row"),
        partition=BlockPartition.from_labels(*labels, num_blocks),
        ranks=torch.from_numpy(ranks).int(),
        scaling=float(file["alpha"]) / int(ranks.sum()),
    )
    results = [torch.from_numpy(file[name]) for name in ("delta_weight", "y", "dx")]
    return Vector(
        path.stem,
        BlockRule(num_blocks, **made),
        problem,
        (*results, packed(file, "dA", "col"), packed(file, "dB", "row")),
        *(file[name] for name in ("row_score", "col_score", "row_order", "col_order")),
    )


@functools.cache
def all_vectors() -> tuple[Vector, ...]:
    """All files, by name. Use: `@pytest.mark.parametrize("vector", all_vectors(), ids=lambda v: v.name)`."""
    return tuple(load_vector(path) for path in sorted(VECTOR_DIR.glob("*.npz")))
