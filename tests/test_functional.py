"""`smoa_linear` on the eager backend: its choice of algorithm, and copies that it avoids.

The promises of every backend are tested in tests/test_contract.py.
"""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import Case, LinearProblem, cases, each, in_orders, make_problem
from torch.utils._python_dispatch import TorchDispatchMode

from smoa_kernels.backends import eager, load_backend
from smoa_kernels.definition.dropout import Dropout
from smoa_kernels.definition.packed import PackedAdapter
from smoa_kernels.definition.precision import gemm_is_ieee

pytestmark = pytest.mark.numerical


def test_auto_chooses_by_the_multiplying_dtype() -> None:
    choose = eager.choose_algorithm
    assert choose(4096, 16, ieee=True, dropout=False) == "merged"
    assert choose(4096, 16, ieee=False, dropout=False) == "split"
    assert choose(4096, 16, ieee=True, dropout=True) == "split"
    assert choose(1, 16, ieee=True, dropout=False) == "expanded"
    assert choose(1, 16, ieee=False, dropout=False) == "expanded"
    assert choose(1, 16, ieee=True, dropout=True) == "split"


def test_reduced_float32_precision_counts_as_half() -> None:
    assert gemm_is_ieee(torch.float64, "cpu")
    assert gemm_is_ieee(torch.float32, "cpu")
    assert gemm_is_ieee(torch.float32, "cuda")
    assert not gemm_is_ieee(torch.bfloat16, "cpu")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert not gemm_is_ieee(torch.float32, "cuda")
        assert not gemm_is_ieee(torch.float32, "cpu")
        assert gemm_is_ieee(torch.float64, "cuda")
    finally:
        torch.set_float32_matmul_precision(before)


class Made(TorchDispatchMode):
    """Records the names of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


BY_INDEX = {
    *("gather", "index", "index_copy", "index_put", "index_select", "scatter", "take", "take_along_dim"),
    *("index_copy_", "index_put_", "scatter_"),
}


def copies(p: LinearProblem, case: Case) -> set[str]:
    """The operators that reorder rows or columns in forward and backward."""
    adapter = PackedAdapter(p.weight, p.A, p.B, p.partition, p.ranks, torch.tensor(p.scaling))
    backend, dropout = load_backend(case.backend), case.dropout
    with Made() as made:
        backend.forward(p.x, p.bias, adapter, "split" if dropout else case.algorithm, dropout)
        backend.backward(p.dy, p.x, adapter, dropout, needs_x=True)
    return BY_INDEX & made.names


def contiguous(backend: str) -> list[Case]:
    """Cases of the eager backend only, because compiled code calls no torch operators."""
    return in_orders(cases(backend), "contiguous") if backend == "eager" else []


@each(contiguous)
def test_contiguous_blocks_are_slices(case: Case) -> None:
    """x, dY, W0 and the factors are sliced, not gathered."""
    assert not copies(case.problem(tokens=50), case)
    assert copies(replace(case, order="random").problem(tokens=50), case)


@pytest.mark.parametrize("algorithm", ["merged", "split", "expanded", "dropout"])
@pytest.mark.parametrize("host", [True, False])
def test_needs_no_values(algorithm: str, host: bool) -> None:
    """Reading a value of a meta tensor raises. That must happen only if the host does not know the ranks."""
    p = make_problem(dtype=torch.float32)
    ranks = p.ranks.tolist()
    p, scaling = p.on("meta"), torch.ones((), device="meta")
    adapter = PackedAdapter(p.weight, p.A, p.B, p.partition, p.ranks, scaling, ranks if host else None)
    seed = torch.ones((), dtype=torch.int64, device="meta")
    dropout = Dropout(seed, 0.3) if algorithm == "dropout" else None
    with nullcontext() if host else pytest.raises(RuntimeError, match="meta"):
        y = eager.forward(p.x, p.bias, adapter, "split" if dropout else algorithm, dropout)
        gradients = eager.backward(p.dy, p.x, adapter, dropout, needs_x=True)
        assert [t.shape for t in (y, *gradients)] == [t.shape for t in (p.dy, p.x, p.A, p.B)]
