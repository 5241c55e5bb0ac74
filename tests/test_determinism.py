"""Determinism between processes and numbers of threads (docs/numerics.md); test_contract.py has the rest."""

import hashlib

import pytest
import torch
from places import ran
from problems import DEVICE, cases, in_orders
from torch_calls import on_threads

from smoa_kernels import BlockPartition
from smoa_kernels.definition.dropout import Dropout

pytestmark = pytest.mark.numerical


def digest() -> str:
    """A digest of all results in float32, on one thread."""
    found, sizes = hashlib.sha256(), {"tokens": 40, "out_features": 70, "in_features": 60}
    with on_threads(1):
        for backend in ("eager", "native", "triton"):
            for case in in_orders(cases(backend), "spectral"):
                if case.dtype == torch.float32:
                    for value in case.problem(**sizes, random_labels=True).run(**case.options):
                        found.update(value.cpu().numpy().tobytes())
    return found.hexdigest()


@pytest.mark.slow
def test_two_processes_are_bitwise_equal() -> None:
    other = ran("-c", "import test_determinism; print(test_determinism.digest())")
    assert other.stdout.strip() == digest(), other.stderr


def test_thread_counts_move_neither_masks_nor_blocks() -> None:
    weight = torch.randn(96, 130, generator=torch.Generator(DEVICE).manual_seed(2))
    masks, partitions = [], []
    for count in (1, 2, 3):
        with on_threads(count):
            masks.append(Dropout(torch.tensor(3), 0.3).multiplier(torch.empty(600, 50)))
            partitions.append(BlockPartition.from_weight(weight, 4))
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert all(partition == partitions[0] for partition in partitions)
