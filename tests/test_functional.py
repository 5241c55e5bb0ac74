"""`smoa_linear` on the eager backend: what it chooses, the panels that it works in, what it need not copy.

What every backend promises: tests/test_contract.py.
"""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import LEAVES, Case, LinearProblem, assert_within_budget, cases, each, in_orders, make_problem
from torch import Tensor
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
    """Collects the names of operators and the shapes of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.shapes: set[torch.Size] = set()

    def __torch_dispatch__(
        self, function: Any, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        self.names.add(function.overloadpacket.__name__)
        result = function(*args, **(kwargs or {}))
        self.shapes |= {result.shape} if isinstance(result, Tensor) else set()
        return result


@pytest.mark.parametrize("wanted", [("x",), ("A",), LEAVES])
@pytest.mark.parametrize("dropout", [None, Dropout(torch.tensor(3), 0.3)], ids=str)
def test_a_gradient_that_nobody_asks_for_is_not_computed(
    wanted: tuple[str, ...], dropout: Dropout | None
) -> None:
    p = make_problem(tokens=300, dtype=torch.float32).on("cpu")  # more than are gathered at a time
    adapter = PackedAdapter(p.weight, p.A, p.B, p.partition, p.ranks, torch.tensor(p.scaling))
    with Made() as made:
        x = p.x if "A" in wanted else None
        dx, dA, dB = eager.backward(p.dy, x, adapter, dropout, needs_x="x" in wanted)
    assert [dx is None, dA is None, dB is None] == ["x" not in wanted, *(2 * ["A" not in wanted])]
    assert (p.x.shape in made.shapes) == ("x" in wanted)


BY_INDEX = {
    *("gather", "index", "index_copy", "index_put", "index_select", "scatter", "take", "take_along_dim"),
    *("index_copy_", "index_put_", "scatter_"),
}


def copies(p: LinearProblem, case: Case) -> set[str]:
    """What puts rows or columns into another order, in forward and backward."""
    adapter = PackedAdapter(p.weight, p.A, p.B, p.partition, p.ranks, torch.tensor(p.scaling))
    backend, dropout = load_backend(case.backend), case.dropout
    with Made() as made:
        backend.forward(p.x, p.bias, adapter, "split" if dropout else case.algorithm, dropout)
        backend.backward(p.dy, p.x, adapter, dropout, needs_x=True)
    return BY_INDEX & made.names


def contiguous(backend: str) -> list[Case]:
    """The eager backend's: compiled code calls no operators."""
    return in_orders(cases(backend), "contiguous") if backend == "eager" else []


@each(contiguous)
def test_contiguous_blocks_are_slices(case: Case) -> None:
    """Of x, dY, W0 and the factors nothing is gathered."""
    assert not copies(case.problem(tokens=50), case)
    assert copies(replace(case, order="random").problem(tokens=50), case)


def panels(p: LinearProblem, case: Case) -> None:
    """The result with W0 in either memory order."""
    for layout in (p, replace(p, weight=p.weight.T.contiguous().T)):
        assert_within_budget(layout.run(**case.options), case, layout)


@pytest.mark.parametrize("shape", [(5, 3), (8, 8), (4, 9)])
def test_panels_of_the_merged_form(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """W_eff a few rows at a time: panels that divide its rows or columns, and that do not."""
    monkeypatch.setattr(eager, "MERGED_PANEL", 4)
    monkeypatch.setattr(eager, "MERGED_BYTES", 0)
    monkeypatch.setattr(eager, "MERGED_ALIGNMENT", 3)
    p = make_problem(out_features=shape[0], in_features=shape[1], ranks=(2, 1), random_labels=True)
    panels(p, Case("eager", "merged", torch.float64))


@pytest.mark.parametrize("algorithm", ["split", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_panels_of_tokens(dtype: torch.dtype, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are summed over panels of tokens, of which the last is short."""
    for name in ("TOKEN_PANEL", "HALF_TOKEN_PANEL"):
        monkeypatch.setattr(eager, name, 4)
    panels(make_problem(random_labels=True, dtype=dtype), Case("eager", algorithm, dtype))


@pytest.mark.parametrize("algorithm", ["merged", "split", "expanded", "dropout"])
@pytest.mark.parametrize("host", [True, False])
def test_needs_no_values(algorithm: str, host: bool) -> None:
    """On meta tensors, where whatever reads a value raises: as it must where the host is not told the ranks."""
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
