"""What an adapter costs before training: the spectral partition against an SVD."""

from __future__ import annotations

import pytest
import torch
from protocol import compare, timed

from smoa_kernels import BlockPartition


@pytest.mark.parametrize("shape", [(512, 512), (1024, 4096), (2048, 2048)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_partition_over_svd(shape: tuple[int, int], smoke: bool, benchmark, report) -> None:
    weight = torch.randn([64, 96] if smoke else shape, generator=torch.Generator().manual_seed(0))
    U, sigma, _ = torch.linalg.svd(weight, full_matrices=False)
    position = torch.arange(sigma.shape[0], dtype=weight.dtype)
    energy = (U * sigma).square()
    expected = torch.argsort((energy @ position) / energy.sum(1), stable=True)
    moved = (BlockPartition.from_weight(weight, 4).row_order != expected).double().mean()
    assert moved < 0.01, f"{moved:.1%} of the rows stand elsewhere than the SVD puts them"
    runs = {
        "SVD": lambda: timed(lambda: torch.linalg.svd(weight, full_matrices=False)),
        "partition": lambda: timed(lambda: BlockPartition.from_weight(weight, 4)),
    }
    comparison = benchmark.pedantic(
        lambda: compare(runs, baseline="SVD", rounds=2 if smoke else 5, warmup=1), rounds=1, iterations=1
    )
    report(f"setup: partition of {tuple(weight.shape)} float32", comparison)
