"""Three oracles for one definition: the vectors, the C code and the plain PyTorch reference."""

import c_oracle
import numpy as np
import pytest
import torch
from problems import DEVICE, make_problem
from torch import Tensor
from vectors import Vector, all_vectors

from smoa_kernels.definition.dropout import Dropout
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
    weight, ranks = tensor(vector.weight), tensor(vector.ranks)
    x, A, B = (tensor(array).requires_grad_() for array in (vector.x, vector.A, vector.B))
    adapter = (A, B, vector.partition(DEVICE), ranks)
    delta = reference_delta_weight(weight, *adapter, scaling=vector.scaling)
    assert_close(delta.detach(), vector.delta_weight)
    y = reference_linear(x, weight, tensor(vector.bias), *adapter, scaling=vector.scaling)
    assert_close(y.detach(), vector.y)
    y.backward(tensor(vector.dy))
    assert_close(x.grad, vector.dx)
    assert_close(A.grad, vector.pack_A(vector.block_dA))
    assert_close(B.grad, vector.pack_B(vector.block_dB))


@pytest.mark.parametrize("random_labels", [False, True])
@pytest.mark.parametrize("ranks", [(3, 0, 2), (1,), (2, 2, 2, 2, 5)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_reference_equals_c_oracle(ranks: tuple[int, ...], random_labels: bool, dropout_p: float) -> None:
    p = make_problem(ranks=ranks, random_labels=random_labels, bias=False)
    dropout = Dropout(torch.tensor(1234), dropout_p) if dropout_p else None
    multiplier = None if dropout is None else dropout.multiplier(p.x)
    adapter = (p.A, p.B, p.partition.row_block, p.partition.col_block, p.ranks)
    options = {"scaling": 0.7, "multiplier": multiplier}
    y = c_oracle.forward(p.x, p.weight, None, *adapter, **options)
    gradients = c_oracle.backward(p.dy, p.x, p.weight, *adapter, **options)
    for ours, expected in zip(p.run_reference(dropout=dropout), (y, *gradients), strict=True):
        assert_close(ours, expected)
    assert_close(p.delta_weight(), c_oracle.delta_weight(p.weight, *adapter, scaling=0.7))
