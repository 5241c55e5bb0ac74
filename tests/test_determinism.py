"""Determinism as docs/numerics.md promises it: some results are bitwise equal, others within the error budget."""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from problems import (
    DEVICE,
    Case,
    all_cases,
    assert_within_budget,
    each,
    error_over_budget,
    interpreted,
    on_threads,
)

from smoa_kernels import BlockPartition
from smoa_kernels.definition.dropout import Dropout

pytestmark = pytest.mark.numerical

DTYPES = (torch.float32, torch.bfloat16)
CASES = [case for case in all_cases() if case.dtype in DTYPES and case.backend != "reference"]
SIZES = {"tokens": 40, "out_features": 70, "in_features": 60, "random_labels": True}


def digest() -> str:
    """A digest of all results of all float32 cases, on one thread."""
    found = hashlib.sha256()
    with on_threads(1):
        for case in CASES:
            if case.dtype == torch.float32:
                for value in case.problem(**SIZES).run(**case.options):
                    found.update(value.cpu().numpy().tobytes())
    return found.hexdigest()


@pytest.mark.slow
def test_two_processes_are_bitwise_equal() -> None:
    here = Path(__file__).parent
    program = "import test_determinism; print(test_determinism.digest())"
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == digest()


@pytest.mark.parametrize("case", [case for case in CASES if case.backend != "triton"], ids=str)
def test_other_thread_counts_stay_within_the_budget(case: Case) -> None:
    p = case.problem(**SIZES)
    for count in (1, 2, 3):
        with on_threads(count):
            assert_within_budget(p.run(**case.options), case, p)


def test_thread_counts_move_neither_masks_nor_blocks() -> None:
    weight = torch.randn(96, 130, generator=torch.Generator(DEVICE).manual_seed(2))
    masks, partitions = [], []
    for count in (1, 2, 3):
        with on_threads(count):
            masks.append(Dropout(torch.tensor(3), 0.3).multiplier(torch.empty(600, 50)))
            partitions.append(BlockPartition.from_weight(weight, 4))
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert all(partition == partitions[0] for partition in partitions)


@pytest.mark.parametrize("cut", [1, 17])
@each(
    lambda backend: [case for case in CASES if case.backend == backend and not case.dropout],
    slow=interpreted,
)
def test_a_batch_in_two_parts_stays_within_the_budget(case: Case, cut: int) -> None:
    """A GEMM of fewer rows may sum in another order, so bits may differ."""
    p = case.problem(**SIZES)
    halves = [replace(p, x=p.x[rows], dy=p.dy[rows]) for rows in (slice(cut), slice(cut, None))]
    parts = [half.run(**case.options) for half in halves]
    for i, name in enumerate(("y", "dX")):
        whole, truth = p.run_reference()[i], p.to(torch.float64).run_reference()[i]
        assert error_over_budget(torch.cat([part[i] for part in parts]), whole, truth) <= 1, name
    for part, half in zip(parts, halves, strict=True):
        assert_within_budget(part, case, half)
