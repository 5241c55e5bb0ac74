"""Three oracles, one definition: the vectors, the C code and the plain PyTorch reference."""

import c_oracle
import numpy as np
import pytest
import torch
from problems import DEVICE, make_problem
from torch import Tensor
from vectors import Vector, all_vectors

from smoa_kernels import BlockPartition
from smoa_kernels.definition.dropout import Dropout
from smoa_kernels.definition.packed import pack_factors, unpack_factors
from smoa_kernels.definition.reference import reference_delta_weight, reference_linear

pytestmark = pytest.mark.numerical

TOLERANCE = 1e-10


def assert_close(value: object, expected: object) -> None:
    if isinstance(value, Tensor):
        value = value.cpu()
    np.testing.assert_allclose(np.asarray(value), np.asarray(expected), rtol=TOLERANCE, atol=TOLERANCE)


def tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).to(DEVICE)


@pytest.mark.parametrize("vector", all_vectors(), ids=lambda v: v.name)
def test_reference_equals_vectors(vector: Vector) -> None:
    weight, x = tensor(vector.weight), tensor(vector.x).requires_grad_()
    partition = vector.partition(DEVICE)
    A, B, ranks = pack_factors(
        [tensor(a) for a in vector.block_A],
        [tensor(b) for b in vector.block_B],
        partition,
    )
    assert_close(A, vector.A)
    assert_close(B, vector.B)
    A.requires_grad_(), B.requires_grad_()
    delta = reference_delta_weight(weight, A, B, partition, ranks, scaling=vector.scaling)
    assert_close(delta.detach(), vector.delta_weight)
    y = reference_linear(x, weight, tensor(vector.bias), A, B, partition, ranks, scaling=vector.scaling)
    assert_close(y.detach(), vector.y)
    y.backward(tensor(vector.dy))
    assert_close(x.grad, vector.dx)
    dA, dB = unpack_factors(A.grad, B.grad, partition, ranks)
    for ours, expected in zip((*dA, *dB), (*vector.block_dA, *vector.block_dB), strict=True):
        assert_close(ours, expected)


@pytest.mark.parametrize("random_labels", [False, True])
@pytest.mark.parametrize("ranks", [(3, 0, 2), (1,), (2, 2, 2, 2, 5)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_reference_equals_c_oracle(ranks: tuple[int, ...], random_labels: bool, dropout_p: float) -> None:
    problem = make_problem(ranks=ranks, random_labels=random_labels, bias=False)
    multiplier, kwargs = None, {}
    if dropout_p:
        seed = torch.tensor(1234)
        multiplier = Dropout(seed, dropout_p).multiplier(problem.x)
        kwargs = {"dropout_p": dropout_p, "dropout_seed": seed}
    y, dx, dA, dB = problem.run_reference(**kwargs)
    arguments = (
        problem.weight,
        problem.A,
        problem.B,
        problem.partition.row_block,
        problem.partition.col_block,
        problem.ranks,
    )
    assert_close(
        y, c_oracle.forward(problem.x, arguments[0], None, *arguments[1:], scaling=0.7, multiplier=multiplier)
    )
    gradients = c_oracle.backward(problem.dy, problem.x, *arguments, scaling=0.7, multiplier=multiplier)
    for ours, expected in zip((dx, dA, dB), (gradients.dx, gradients.dA, gradients.dB), strict=True):
        assert_close(ours, expected)
    weight, A, B = problem.weight, problem.A, problem.B
    delta = reference_delta_weight(weight, A, B, problem.partition, problem.ranks, scaling=0.7)
    assert_close(delta, c_oracle.delta_weight(*arguments, scaling=0.7))


def test_packing_checks_its_blocks() -> None:
    partition = BlockPartition.from_labels(torch.tensor([0, 0, 1]), torch.tensor([0, 1]), 2)
    A, B = [torch.ones(1, 1), torch.ones(2, 1)], [torch.ones(2, 1), torch.ones(1, 2)]
    packed_A, packed_B, ranks = pack_factors(A, B, partition)
    assert ranks.tolist() == [1, 2]
    assert packed_A.tolist() == [[1, 1], [0, 1]]
    assert packed_B.tolist() == [[1, 0], [1, 0], [1, 1]]
