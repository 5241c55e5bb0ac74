"""What docs/numerics.md says of determinism: what is bitwise equal, and what is only within the error budget."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from problems import DEVICE, LinearProblem, error_over_budget, make_problem, obstacle
from torch import Tensor

from smoa_kernels import BlockPartition
from smoa_kernels.definition.dropout import Dropout

pytestmark = pytest.mark.numerical

NAMES = ("y", "dX", "dA", "dB", "dbias")
DTYPES = (torch.float32, torch.bfloat16)
DROPOUT = {"dropout_p": 0.3, "dropout_seed": torch.tensor(7, device=DEVICE)}
WAYS: list[dict[str, object]] = [
    *({"backend": "eager", "algorithm": algorithm} for algorithm in ("merged", "split", "expanded")),
    *({"backend": "triton", "algorithm": algorithm} for algorithm in ("merged", "split", "fused")),
    {"backend": "native", "algorithm": "merged"},
    *({"backend": backend, **DROPOUT} for backend in ("eager", "native", "triton")),
]

each_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(map(str, list(way.values())[:2])))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def runs_here(request: pytest.FixtureRequest) -> None:
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    reason = (
        obstacle(params["way"]["backend"], params.get("dtype", torch.float32)) if "way" in params else None
    )
    if reason is not None:
        pytest.skip(reason)


def problem(dtype: torch.dtype) -> LinearProblem:
    sizes = {"tokens": 40, "out_features": 70, "in_features": 60, "ranks": (3, 0, 2)}
    return make_problem(**sizes, random_labels=True, dtype=dtype)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_within_budget(found: tuple[Tensor, ...], p: LinearProblem, way: dict[str, object]) -> None:
    dropout = {key: value for key, value in way.items() if key.startswith("dropout")}
    same, truth = p.run_reference(**dropout), p.to(torch.float64).run_reference(**dropout)
    for name, *three in zip(NAMES, found, same, truth, strict=True):
        assert error_over_budget(*three) <= 1, name


@each_dtype
@each_way
def test_two_runs_are_bitwise_equal(way: dict[str, object], dtype: torch.dtype) -> None:
    p = problem(dtype)
    for name, first, second in zip(NAMES, p.run(**way), p.run(**way), strict=True):
        assert torch.equal(first, second), name


def digest() -> str:
    """Of every result of every way, on one thread."""
    found = hashlib.sha256()
    with threads(1):
        for way in WAYS:
            if obstacle(str(way["backend"])) is None:
                for value in problem(torch.float32).run(**way):
                    found.update(value.cpu().numpy().tobytes())
    return found.hexdigest()


def test_two_processes_are_bitwise_equal() -> None:
    here = Path(__file__).parent
    program = "import test_determinism; print(test_determinism.digest())"
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == digest()


@each_dtype
@pytest.mark.parametrize("way", [way for way in WAYS if way["backend"] != "triton"], ids=str)
def test_other_thread_counts_stay_within_the_budget(way: dict[str, object], dtype: torch.dtype) -> None:
    p = problem(dtype)
    for count in (1, 2, 3):
        with threads(count):
            assert_within_budget(p.run(**way), p, way)


def test_thread_counts_move_neither_masks_nor_blocks() -> None:
    weight = torch.randn(96, 130, generator=torch.Generator(DEVICE).manual_seed(2))
    masks, partitions = [], []
    for count in (1, 2, 3):
        with threads(count):
            masks.append(Dropout(torch.tensor(3), 0.3).multiplier(torch.empty(600, 50)))
            partitions.append(BlockPartition.from_weight(weight, 4))
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert all(partition == partitions[0] for partition in partitions)


@each_dtype
@pytest.mark.parametrize("cut", [1, 17])
@pytest.mark.parametrize("way", [way for way in WAYS if "dropout_p" not in way], ids=str)
def test_a_batch_in_two_parts_stays_within_the_budget(
    way: dict[str, object], cut: int, dtype: torch.dtype
) -> None:
    """A GEMM of fewer rows may sum in another order: no bit is promised."""
    p = problem(dtype)
    parts = [replace(p, x=p.x[rows], dy=p.dy[rows]).run(**way) for rows in (slice(cut), slice(cut, None))]
    for i, name in enumerate(("y", "dX")):
        whole, truth = p.run_reference()[i], p.to(torch.float64).run_reference()[i]
        assert error_over_budget(torch.cat([part[i] for part in parts]), whole, truth) <= 1, name
    for part, rows in zip(parts, (slice(cut), slice(cut, None)), strict=True):
        assert_within_budget(part, replace(p, x=p.x[rows], dy=p.dy[rows]), way)


def test_a_mask_counts_tokens_from_the_start_of_its_call() -> None:
    """So the first part of a batch sees the whole batch's mask, and the second does not."""
    p = problem(torch.float64)
    whole = p.run(backend="eager", **DROPOUT)[0]
    first, second = (
        replace(p, x=p.x[rows], dy=p.dy[rows]).run(backend="eager", **DROPOUT)[0]
        for rows in (slice(16), slice(16, None))
    )
    torch.testing.assert_close(first, whole[:16])
    assert not torch.allclose(second, whole[16:])
