"""What is measured of an update: against cases whose numbers are known, and against the definition in loops."""

import math

import pytest
import torch
from problems import DEVICE, make_problem
from torch import Tensor

from smoa_kernels import BlockPartition
from smoa_kernels.definition.reference import reference_delta_weight
from smoa_kernels.spectrum.layer import (
    LayerSpectrum,
    cumulated,
    effective_number,
    layer_spectrum,
)

pytestmark = pytest.mark.numerical

DIAGONAL = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))


def unit(*places: tuple[int, int]) -> Tensor:
    matrix = torch.zeros(4, 4, dtype=torch.float64)
    for place in places:
        matrix[place] = 2.0
    return matrix


def measured(weight: Tensor, update: Tensor, num_blocks: int = 1) -> LayerSpectrum:
    weight = weight.to(DEVICE)
    return layer_spectrum(weight, BlockPartition.from_weight(weight, num_blocks), {"it": update.to(DEVICE)})


@pytest.mark.parametrize(
    ("update", "left", "right", "rank", "effective", "coverage"),
    [
        (unit((0, 0)), [1, 0, 0, 0], [1, 0, 0, 0], 1, 1.0, 1 / 4),
        (unit((1, 3)), [0, 1, 0, 0], [0, 0, 0, 1], 1, 1.0, 1 / 4),
        (unit((0, 0), (0, 1), (0, 2), (0, 3)), [1, 0, 0, 0], [1 / 4] * 4, 1, 1.0, math.sqrt(1 * 4) / 4),
        (torch.eye(4), [1 / 4] * 4, [1 / 4] * 4, 4, 4.0, 1.0),
        (torch.ones(4, 4), [1 / 4] * 4, [1 / 4] * 4, 1, 1.0, 1.0),
        (torch.zeros(4, 4), [0] * 4, [0] * 4, 0, 0.0, 0.0),
    ],
    ids=[
        "one direction",
        "left 2, right 4",
        "a row",
        "every direction by itself",
        "every direction at once",
        "nothing",
    ],
)
def test_over_a_diagonal_weight(
    update: Tensor, left: list[float], right: list[float], rank: int, effective: float, coverage: float
) -> None:
    """Its singular directions are the coordinates. A rank of one may touch them all: coverage is not rank."""
    found = measured(DIAGONAL, update).updates["it"]
    assert found.left.tolist() == pytest.approx(left)
    assert found.right.tolist() == pytest.approx(right)
    assert found.rank == rank
    assert found.effective_rank == pytest.approx(effective)
    assert found.coverage == pytest.approx(coverage)
    norm = torch.linalg.matrix_norm(update) / torch.linalg.matrix_norm(DIAGONAL)
    assert found.relative_norm == pytest.approx(float(norm))


def test_blocks_of_a_diagonal_weight() -> None:
    layer = measured(DIAGONAL, torch.eye(4), num_blocks=2)
    assert layer.singular_values.tolist() == [4, 3, 2, 1]
    assert (layer.rank, layer.shape) == (4, (4, 4))
    assert layer.effective_rank == pytest.approx(effective_number(torch.tensor([16.0, 9.0, 4.0, 1.0])))
    blocks = layer.blocks
    for shares in (blocks.row_shares, blocks.col_shares, blocks.diagonal_shares):
        assert shares.tolist() == pytest.approx([25 / 30, 5 / 30])
    assert blocks.left.tolist() == blocks.right.tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("shape", [(33, 57), (57, 33), (1, 5), (5, 1), (7, 7)])
def test_the_definition_in_loops(shape: tuple[int, int]) -> None:
    p = make_problem(out_features=shape[0], in_features=shape[1], ranks=(2, 0, 1), random_labels=True)
    update = reference_delta_weight(p.weight, p.A, p.B, p.partition, p.ranks, scaling=p.scaling)
    layer = layer_spectrum(p.weight, p.partition, {"it": update})
    found = layer.updates["it"]
    U, sigma, Vh = torch.linalg.svd(p.weight, full_matrices=False)
    energy = update.square().sum()
    for j in range(len(sigma)):
        assert float(found.left[j]) == pytest.approx(float((U[:, j] @ update).square().sum() / energy))
        assert float(found.right[j]) == pytest.approx(float((update @ Vh[j]).square().sum() / energy))
        for k in range(3):
            rows, cols = p.partition.rows(k), p.partition.cols(k)
            assert float(layer.blocks.left[k, j]) == pytest.approx(float(U[rows, j].square().sum()))
            assert float(layer.blocks.right[k, j]) == pytest.approx(float(Vh[j, cols].square().sum()))
    for k in range(3):
        inside = p.weight[p.partition.rows(k)][:, p.partition.cols(k)].square().sum()
        assert float(layer.blocks.diagonal_shares[k]) == pytest.approx(
            float(inside / p.weight.square().sum())
        )
    # The smaller side's directions are a basis of it, the larger side's are not.
    small, large = (found.left, found.right) if shape[0] <= shape[1] else (found.right, found.left)
    assert float(small.sum()) == pytest.approx(1)
    assert float(large.sum()) < 1 or shape[0] == shape[1]
    torch.testing.assert_close(found.singular_values, torch.linalg.svdvals(update))


def test_random_low_rank_touches_many_directions_in_few_ways() -> None:
    """Shares like χ² of r degrees of freedom: coverage `r/2 · e^-ψ(r/2 + 1)` at every size, effective rank below r."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    weight = randn(400, 400)
    for r in (1, 4, 16):
        found = measured(weight, randn(400, r) @ randn(r, 400)).updates["it"]
        expected = r / 2 * math.exp(-float(torch.special.digamma(torch.tensor(r / 2 + 1))))
        assert found.coverage == pytest.approx(expected, rel=0.08)
        assert found.rank == r
        assert found.effective_rank <= r


def test_scale_does_not_count() -> None:
    p = make_problem()
    update = reference_delta_weight(p.weight, p.A, p.B, p.partition, p.ranks, scaling=1.0)
    layer = layer_spectrum(p.weight, p.partition, {"one": update, "million": update * 1e6})
    one, million = layer.updates["one"], layer.updates["million"]
    torch.testing.assert_close(one.left, million.left)
    assert one.coverage == pytest.approx(million.coverage)
    assert one.effective_rank == pytest.approx(million.effective_rank)
    assert one.rank == million.rank


def test_a_zero_weight_has_numbers_too() -> None:
    layer = measured(torch.zeros(3, 5), torch.ones(3, 5))
    assert (layer.rank, layer.effective_rank) == (0, 0)
    assert layer.updates["it"].relative_norm == math.inf
    assert layer.blocks.diagonal_shares.tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_types_are_measured_in_float64(dtype: torch.dtype) -> None:
    p = make_problem().to(dtype)
    layer = measured(p.weight, p.weight)
    wide = measured(p.weight.double(), p.weight.double())
    assert torch.equal(layer.updates["it"].left, wide.updates["it"].left)
    assert layer.singular_values.dtype == torch.float64


def test_cumulated() -> None:
    shares = torch.tensor([0.5, 0.25, 0.25])
    assert cumulated(shares, 4) == pytest.approx([0, 0.5, 0.75, 1])
    assert cumulated(shares, 7) == pytest.approx([0, 0.25, 0.5, 0.625, 0.75, 0.875, 1])
    assert cumulated(torch.ones(1), 3) == pytest.approx([0, 0.5, 1])
