"""What an adapter costs before training: the spectral partition against an SVD."""

from __future__ import annotations

import pytest
import torch
from protocol import compare, timed
from torch import Tensor

from smoa_kernels import BlockPartition


def check(weight: Tensor, num_blocks: int = 4) -> None:
    """The gate: as many rows in the block where float64 puts them as a float32 SVD manages, within twice.

    Blocks, not orders: neighbours of nearly equal centroid swap with the last bit, and nothing depends on it.
    """
    truth = svd_row_blocks(weight.double(), num_blocks)
    ours = BlockPartition.from_weight(weight, num_blocks).row_block
    misplaced, budget = (
        int((labels != truth).sum()) for labels in (ours, svd_row_blocks(weight, num_blocks))
    )
    if misplaced > 2 * budget + 1:
        raise AssertionError(f"{misplaced} rows stand in another block than in float64, the SVD's {budget}")


def svd_row_blocks(weight: Tensor, num_blocks: int) -> Tensor:
    """Block of each row by the definition's own words: a thin SVD, energies, mean position, tensor_split."""
    U, sigma, _ = torch.linalg.svd(weight, full_matrices=False)
    energy = (U * sigma).square()
    position = torch.arange(sigma.shape[0], dtype=weight.dtype)
    order = torch.argsort((energy @ position) / energy.sum(1), stable=True)
    labels = torch.empty_like(order)
    for block, rows in enumerate(order.tensor_split(num_blocks)):
        labels[rows] = block
    return labels


@pytest.mark.parametrize("shape", [(512, 512), (1024, 4096), (2048, 2048)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_partition_over_svd(shape: tuple[int, int], smoke: bool, benchmark, report) -> None:
    weight = torch.randn([64, 96] if smoke else shape, generator=torch.Generator().manual_seed(0))
    check(weight)
    runs = {
        "SVD": lambda: timed(lambda: torch.linalg.svd(weight, full_matrices=False)),
        "partition": lambda: timed(lambda: BlockPartition.from_weight(weight, 4)),
    }
    comparison = benchmark.pedantic(
        lambda: compare(runs, baseline="SVD", rounds=2 if smoke else 5, warmup=1), rounds=1, iterations=1
    )
    report(f"setup: partition of {tuple(weight.shape)} float32", comparison)
