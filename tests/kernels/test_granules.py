"""Blocks made of whole granules: the same bits as coordinate by coordinate; slices of one size are not copied."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from audit.workloads import configured
from kernel_cases import tiles
from problems import DEVICE, Case, LinearProblem, assert_within_budget, cases, make_problem
from torch import Tensor

from smoa_kernels.backends import triton as triton_backend
from smoa_kernels.definition.dropout import Dropout
from smoa_kernels.definition.partition import BlockPartition
from smoa_kernels.kernels import launch, permute
from smoa_kernels.kernels.permute import gather_columns, scatter_columns
from smoa_kernels.kernels.spec import block_width, granule_of

pytestmark = pytest.mark.numerical

# Block sizes that are no multiple of a tile, and a block without columns or ranks.
PARTITIONS = {
    "contiguous": lambda: BlockPartition.contiguous((80, 144), 3, granule=8),
    "granules": lambda: BlockPartition.random((80, 144), 3, granule=8, seed=1),
    "granules of 24": lambda: BlockPartition.random((48, 144), 2, granule=24, seed=2),
    "one block": lambda: BlockPartition.contiguous((40, 64), 1),
    "an empty block": lambda: BlockPartition.contiguous((80, 144), 3, granule=8).shard(col_slice=slice(48)),
}
FEW = {("granules of 24", torch.bfloat16), ("an empty block", torch.bfloat16)}
each_partition = pytest.mark.parametrize("name", PARTITIONS)
# A launch in the interpreter takes a second, so most cases run only in `make test-slow`.
each_case = pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if (name, dtype) in FEW else [pytest.mark.slow])
        for name in PARTITIONS
        for dtype in (torch.float32, torch.bfloat16)
    ],
)


def problem_of(name: str, dtype: torch.dtype, tokens: int = 21) -> LinearProblem:
    partition = PARTITIONS[name]()
    N, C = partition.shape
    ranks = (3, 0, 20)[: partition.num_blocks]
    sizes = {"tokens": tokens, "out_features": N, "in_features": C, "ranks": ranks}
    p = make_problem(**sizes, block_order="contiguous").to(dtype)  # type: ignore[arg-type]
    return LinearProblem(**(vars(p) | {"partition": partition.to(DEVICE)}))


def granule(partition: BlockPartition) -> int:
    return granule_of(partition.granularity, partition.shape)


@contextmanager
def coordinate_by_coordinate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hide the granules from the kernels."""
    with monkeypatch.context() as patch:
        for module in (launch, permute):
            patch.setattr(module, "granule_of", lambda *sizes: 1)
        yield


def test_which_partitions_have_granules() -> None:
    for name, make in PARTITIONS.items():
        assert granule(make()) == 8, name
        # Granules are found from the labels alone.
        p = make()
        assert granule(BlockPartition.from_labels(p.row_block, p.col_block, p.num_blocks)) == 8, name
    for single in (
        BlockPartition.random((80, 144), 3, granule=4),
        BlockPartition.random((80, 144), 3, granule=12),
        BlockPartition.contiguous((80, 140), 2, granule=8),  # the last granule is short
        BlockPartition.contiguous((36, 144), 1),
    ):
        assert granule(single) == 1


@each_case
def test_a_step(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """y, dX, dA and dB of "split", whose kernels read x, dY and W0 a granule at a time."""
    p = problem_of(name, dtype)
    adapter, small = p.adapter(), tiles("contract", p)[0]
    monkeypatch.setattr(triton_backend, "_chosen", lambda *_: "split")

    def results() -> list[Tensor]:
        with configured("contract", small):
            y = triton_backend.forward(p.x, None, replace(adapter), "split", None)
            return [y, *triton_backend.backward(p.dy, p.x, replace(adapter), None, needs_x=True)]

    with coordinate_by_coordinate(monkeypatch):
        expected = results()
    assert all(map(torch.equal, results(), expected))


@each_partition
def test_dropout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask is the same whether x is gathered or read in place."""
    p = problem_of(name, torch.float32)
    blocks, width = p.partition, block_width(p.partition.col_sizes)
    dropout = Dropout(torch.tensor(5), p=0.25)

    def moved() -> tuple[Tensor, Tensor]:
        blocked = gather_columns(p.x, blocks, width, dropout=dropout)
        return blocked, scatter_columns(blocked, blocks, torch.empty_like(p.x), dropout=dropout)

    with coordinate_by_coordinate(monkeypatch):
        expected = moved()
    assert all(map(torch.equal, moved(), expected))


@pytest.mark.parametrize(
    ("order", "features", "copies"),
    [("contiguous", (80, 144), False), ("random", (80, 144), True), ("contiguous", (88, 152), True)],
)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=str(case), marks=[] if case.dtype == torch.bfloat16 else [pytest.mark.slow])
        for case in cases("triton")
    ],
)
def test_slices_of_one_size_are_copied_only_under_dropout(
    case: Case, order: str, features: tuple[int, int], copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[int] = []
    original = triton_backend.gather_columns

    def seen(x: Tensor, *rest: object, **options: object) -> Tensor:
        copied.append(x.shape[1])
        return original(x, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(triton_backend, "gather_columns", seen)
    N, C = features
    sizes = {"tokens": 20, "out_features": N, "in_features": C, "ranks": (5, 0, 2) if N == 88 else (5, 2)}
    p = case.problem(**sizes, block_order=order, granule=8)
    assert_within_budget(p.run(**case.options), case, p)
    # x and dY for dA and dB, and what a product of blocks takes.
    gradients = [N, C] if copies or case.dropout else []
    forward = [C] if case.dropout or (copies and case.algorithm == "split") else []
    backward = [N] if case.dropout else []
    expected = [*forward, *gradients, *backward]
    assert copied == expected if copies else copied.count(C) == 2 * bool(case.dropout)
