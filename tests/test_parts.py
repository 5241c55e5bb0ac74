"""float32 by AMX, each number in three bfloat16 parts: accuracy, NaN and infinity.

Shapes around its tiles are tested in tests/test_native.py.
"""

import pytest
import torch
from compiled import CPU, needs_amx
from torch import Tensor

from smoa_kernels import BlockPartition
from smoa_kernels.backends.native import backend
from smoa_kernels.definition.packed import PackedAdapter, scaling_tensor


def product(x: Tensor, weight: Tensor) -> Tensor:
    """`x W0ᵀ`, from an adapter with a zero update."""
    partition = BlockPartition.contiguous(weight.shape, 1)
    A, B = weight.new_zeros(1, weight.shape[1]), weight.new_zeros(len(weight), 1)
    ranks = torch.zeros(1, dtype=torch.int32)
    adapter = PackedAdapter(weight, A, B, partition, ranks, scaling_tensor(1.0, CPU))
    return backend.forward(x, None, adapter, "merged", None)


def row_errors(y: Tensor, truth: Tensor) -> Tensor:
    """Errors of each row relative to its norm, because magnitudes differ between rows."""
    return torch.linalg.vector_norm(y - truth, dim=1) / torch.linalg.vector_norm(truth, dim=1)


@needs_amx
@pytest.mark.parametrize("terms", [60, 384, 3000])
@pytest.mark.parametrize("numbers", ["normal", "positive", "of any magnitude"])
def test_it_is_as_exact_as_torchs(numbers: str, terms: int) -> None:
    """All six products are needed: without the smallest one, errors are 2e-6."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, terms, generator=generator) for rows in (130, 100))
    if numbers == "positive":
        x, weight = x.abs(), weight.abs()
    if numbers == "of any magnitude":
        x *= 10 ** torch.linspace(-10, 10, len(x))[:, None]
        weight *= 10 ** torch.linspace(-3, 3, terms)
    truth = x.double() @ weight.double().T
    ours, reference = (row_errors(y.double(), truth) for y in (product(x, weight), x @ weight.T))
    assert ours.square().mean() <= 1.5**2 * reference.square().mean()
    assert ours.max() <= 1.5 * reference.max()


@needs_amx
def test_the_largest_numbers_are_finite() -> None:
    x, weight = torch.full((100, 64), torch.finfo(torch.float32).max), torch.full((40, 64), 2.0**-8)
    torch.testing.assert_close(product(x, weight), x @ weight.T)


@needs_amx
@pytest.mark.parametrize("magnitude", [1e-28, 1e-32, 1e-36, 1e-40, 0.0])
def test_the_smallest_numbers_lose_digits_and_nothing_else(magnitude: float) -> None:
    """Numbers and sums below 2^-126 count as 0."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 200, generator=generator) for rows in (100, 70))
    x *= magnitude
    lost = product(x, weight).double() - x.double() @ weight.double().T
    assert lost.abs().max() <= 1e-4 * magnitude + 200 * 2.0**-126


@needs_amx
@pytest.mark.parametrize("bits", [0x7F800000, 0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1])
def test_nan_and_infinity(bits: int) -> None:
    """Infinity and any NaN give NaN in the results that depend on them, and in no others."""
    value = torch.tensor(bits).int().view(torch.float32)
    x, weight = torch.ones(100, 70), torch.ones(40, 70)
    x[3, 69], weight[7, 5] = value, value
    finite = torch.ones(100, 40, dtype=torch.bool)
    finite[3], finite[:, 7] = False, False
    assert torch.equal(product(x, weight).isfinite(), finite)
