"""`smoa_linear`: numbers, gradients, memory, precision and its choices, on the eager backend."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from problems import DEVICE, LinearProblem, error_over_budget, make_problem, relative_error
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from smoa_kernels import smoa_linear
from smoa_kernels.backends import eager
from smoa_kernels.definition.precision import gemm_is_ieee
from smoa_kernels.definition.reference import reference_linear

pytestmark = pytest.mark.numerical

ALGORITHMS = ("merged", "split", "expanded")
SHAPES = [
    {"ranks": (3, 0, 2)},
    {"ranks": (4,)},  # K = 1 is HiRA
    {"ranks": (2, 2), "bias": False},
    {"ranks": (1, 5, 2, 2), "random_labels": True},
    {"ranks": (2,) * 9, "random_labels": True, "out_features": 7, "in_features": 5},  # some blocks are empty
    {"ranks": (0, 0, 1), "tokens": 1},
]


def assert_equal_to_reference(problem: LinearProblem, tolerance: float = 1e-10, **kwargs: object) -> None:
    dropout = {k: v for k, v in kwargs.items() if k.startswith("dropout")}
    expected = problem.run_reference(**dropout)
    for name, ours, truth in zip(
        ("y", "dx", "dA", "dB", "dbias"), problem.run(**kwargs), expected, strict=False
    ):
        assert relative_error(ours, truth) < tolerance, name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape: dict[str, object], algorithm: str) -> None:
    assert_equal_to_reference(make_problem(**shape), algorithm=algorithm)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference_with_dropout(shape: dict[str, object]) -> None:
    assert_equal_to_reference(make_problem(**shape), dropout_p=0.4, dropout_seed=torch.tensor(9))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ranks", [(2,), (2, 1), (3, 0, 1)])
@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "dropout"])
def test_gradcheck(algorithm: str, ranks: tuple[int, ...], bias: bool) -> None:
    p = make_problem(tokens=4, out_features=7, in_features=6, ranks=ranks, bias=bias)
    options: dict[str, object] = {"algorithm": algorithm}
    if algorithm == "dropout":
        options = {"dropout_p": 0.4, "dropout_seed": torch.tensor(3)}

    def function(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
        return smoa_linear(x, p.weight, bias, A, B, p.partition, p.ranks, scaling=0.7, **options)

    inputs = [None if t is None else t.clone().requires_grad_() for t in (p.x, p.A, p.B, p.bias)]
    assert torch.autograd.gradcheck(function, inputs)


def test_padding_reaches_neither_outputs_nor_gradients() -> None:
    clean, dirty = make_problem(fill_padding=False), make_problem(fill_padding=True)
    assert not torch.equal(clean.A, dirty.A)
    slot = torch.arange(3)
    padding_A = slot[:, None] >= dirty.ranks[dirty.partition.col_block.long()]
    padding_B = slot >= dirty.ranks[dirty.partition.row_block.long(), None]
    for algorithm in ALGORITHMS:
        expected, (y, dx, dA, dB, _) = clean.run(algorithm=algorithm), dirty.run(algorithm=algorithm)
        assert torch.equal(y, expected[0])
        assert torch.equal(dx, expected[1])
        assert (dA[padding_A] == 0).all()
        assert (dB[padding_B] == 0).all()


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf")])
def test_padding_may_hold_anything(rubbish: float) -> None:
    """Memory that nobody initialised, or an optimiser that divided by zero there, must not reach a result."""
    clean, dirty = make_problem(fill_padding=False), make_problem(fill_padding=False)
    slot = torch.arange(3)
    dirty.A[slot[:, None] >= dirty.ranks[dirty.partition.col_block.long()]] = rubbish
    dirty.B[slot >= dirty.ranks[dirty.partition.row_block.long(), None]] = rubbish
    for algorithm in ALGORITHMS:
        for ours, expected in zip(
            dirty.run(algorithm=algorithm), clean.run(algorithm=algorithm), strict=True
        ):
            assert torch.equal(ours, expected), algorithm


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.T.contiguous().T,
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
        lambda x: x[:1].expand(x.shape[0], -1),
    ],
    ids=["column-major", "row stride beyond the width", "strided columns", "expanded"],
)
def test_strided_x_and_weight(layout: Callable[[Tensor], Tensor], algorithm: str) -> None:
    problem = make_problem()
    x = layout(problem.x)
    assert not x.is_contiguous()
    for weight in (problem.weight, problem.weight.T.contiguous().T):
        strided = replace(problem, x=x, weight=weight, dy=layout(problem.dy))
        assert_equal_to_reference(strided, algorithm=algorithm)


@pytest.mark.parametrize("leading", [(), (2, 3), (1, 1, 5), (0,), (3, 0)])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_any_leading_dimensions(leading: tuple[int, ...], algorithm: str) -> None:
    p = make_problem()
    x = torch.randn(*leading, 57, dtype=torch.float64, requires_grad=True)
    A = p.A.clone().requires_grad_()
    y = smoa_linear(x, p.weight, p.bias, A, p.B, p.partition, p.ranks, scaling=0.7, algorithm=algorithm)
    assert y.shape == (*leading, 33)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert A.grad is not None
    assert bool(A.grad.isfinite().all())


@pytest.mark.parametrize("wanted", ["x", "A", "B", "bias", None])
def test_honours_needs_input_grad(wanted: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    p = make_problem()
    tensors = {"x": p.x, "A": p.A, "B": p.B, "bias": p.bias}
    tensors = {name: t.clone().requires_grad_(name == wanted) for name, t in tensors.items()}
    calls = []
    for name, call in (("factor_gradients", "factors"), ("input_gradient", "weight")):
        monkeypatch.setattr(eager, name, _recording(getattr(eager, name), call, calls))
    y = smoa_linear(
        tensors["x"], p.weight, tensors["bias"], tensors["A"], tensors["B"], p.partition, p.ranks, scaling=0.7,
        backend="eager",
    )  # fmt: skip
    calls.clear()
    assert y.requires_grad == (wanted is not None)
    if wanted is not None:
        y.backward(p.dy)
    assert [name for name, t in tensors.items() if t.grad is not None] == ([wanted] if wanted else [])
    assert calls == {"x": ["weight"], "A": ["factors"], "B": ["factors"]}.get(wanted or "", [])


def _recording(function: Callable[..., object], name: str, calls: list[str]) -> Callable[..., object]:
    def record(*args: object) -> object:
        calls.append(name)
        return function(*args)

    return record


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "dropout"])
def test_saves_nothing_but_x_factors_and_frozen_tensors(algorithm: str) -> None:
    p = make_problem(tokens=50)
    seed = torch.tensor(3)
    options: dict[str, object] = {"algorithm": algorithm}
    if algorithm == "dropout":
        options = {"dropout_p": 0.4, "dropout_seed": seed}
    x, A, B = (t.clone().requires_grad_() for t in (p.x, p.A, p.B))
    scaling = torch.tensor(0.7, dtype=torch.float64)
    known = {t.data_ptr() for t in (x, A, B, p.weight, p.ranks, scaling, seed, *p.partition.tensors())}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        smoa_linear(x, p.weight, p.bias, A, B, p.partition, p.ranks, scaling=scaling, **options)
    assert {x.data_ptr(), A.data_ptr(), B.data_ptr()} <= {t.data_ptr() for t in saved}
    assert {t.data_ptr() for t in saved} <= known


def test_frozen_factors_do_not_keep_x() -> None:
    p = make_problem()
    x = p.x.clone().requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        smoa_linear(x, p.weight, p.bias, p.A, p.B, p.partition, p.ranks, scaling=0.7)
    assert x.data_ptr() not in {t.data_ptr() for t in saved}


@pytest.mark.parametrize("factor_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "auto"])
def test_error_within_twice_the_same_dtype_reference(
    algorithm: str, dtype: torch.dtype, factor_dtype: torch.dtype | None
) -> None:
    exact = make_problem(tokens=96, out_features=160, in_features=192, ranks=(6, 4, 6))
    rounded = exact.to(dtype, factor_dtype)
    truth = rounded.to(torch.float64).run_reference()
    ours, baseline = rounded.run(algorithm=algorithm, backend="eager"), rounded.run_reference()
    for name, value, same_dtype, expected in zip(
        ("y", "dx", "dA", "dB", "dbias"), ours, baseline, truth, strict=True
    ):
        assert value.dtype == same_dtype.dtype, name
        assert error_over_budget(value, same_dtype, expected) <= 1, name


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


def test_autocast_gradients_have_the_leaves_dtypes() -> None:
    p = make_problem(dtype=torch.float32)
    x, A, B, bias = (t.clone().requires_grad_() for t in (p.x, p.A, p.B, p.bias))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = smoa_linear(x, p.weight, bias, A, B, p.partition, p.ranks, scaling=0.7)
    y.float().sum().backward()
    assert {t.grad.dtype for t in (x, A, B, bias)} == {torch.float32}


def test_dropout_draws_its_seed_from_the_default_generator() -> None:
    p = make_problem()

    def run() -> Tensor:
        torch.manual_seed(11)
        return p.run(dropout_p=0.5)[0]

    assert torch.equal(run(), run())
    assert not torch.equal(run(), p.run(dropout_p=0.5)[0])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_recomputes_the_same_mask(use_reentrant: bool) -> None:
    p = make_problem()

    def run(wrap: bool) -> tuple[Tensor, Tensor]:
        torch.manual_seed(4)
        x, A = p.x.clone().requires_grad_(), p.A.clone().requires_grad_()

        def layer(x: Tensor) -> Tensor:
            return smoa_linear(x, p.weight, p.bias, A, p.B, p.partition, p.ranks, scaling=0.7, dropout_p=0.4)

        y = checkpoint(layer, x, use_reentrant=use_reentrant) if wrap else layer(x)
        y.backward(p.dy)
        return x.grad, A.grad

    for plain, recomputed in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, recomputed)


def test_nan_in_x_is_not_hidden() -> None:
    p = make_problem()
    p.x[3, 5] = float("nan")
    for algorithm in ALGORITHMS:
        y, dx, dA, *_ = p.run(algorithm=algorithm)
        assert y[3].isnan().all()
        assert not y[4].isnan().any()
        assert dA.isnan().any()
        assert not dx.isnan().any()


def test_double_backward_says_what_to_do() -> None:
    p = make_problem()
    x, A = p.x.clone().requires_grad_(), p.A.clone().requires_grad_()
    y = smoa_linear(x, p.weight, p.bias, A, p.B, p.partition, p.ranks, scaling=0.7)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"no second derivative; smoa_kernels\.definition\.reference\.reference_linear"
    ):
        dx.sum().backward()


@pytest.mark.parametrize("name", ["x", "bias", "A", "B"])
@pytest.mark.parametrize("others_train", [False, True])
def test_a_forward_mode_derivative_is_refused(name: str, others_train: bool) -> None:
    """Not zero, which is what a result without a tangent stands for; the reference has one."""
    p = make_problem()
    given = {key: getattr(p, key) for key in ("x", "weight", "bias", "A", "B", "partition", "ranks")}
    given = {
        key: t.clone().requires_grad_() if others_train and key in "AB" else t for key, t in given.items()
    }

    def along(function: Callable[..., Tensor]) -> Tensor:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(getattr(p, name), getattr(p, name))
            y = function(**given | {name: dual}, scaling=p.scaling)
            return forward_ad.unpack_dual(y).tangent

    assert along(reference_linear).any()
    with pytest.raises(
        RuntimeError, match=r"no forward-mode derivative; smoa_kernels\.definition\.reference"
    ):
        along(smoa_linear)
    with forward_ad.dual_level():  # of something else
        assert smoa_linear(**given, scaling=p.scaling).isfinite().all()


def test_the_reference_has_a_second_derivative() -> None:
    p = make_problem()
    A, x = p.A.clone().requires_grad_(), p.x.clone().requires_grad_()
    y = reference_linear(x, p.weight, p.bias, A, p.B, p.partition, p.ranks, scaling=p.scaling)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    dx.square().sum().backward()
    assert A.grad is not None


@pytest.mark.parametrize("dropout", [{}, {"dropout_p": 0.4, "dropout_seed": torch.tensor(9, device=DEVICE)}])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_backend_is_the_reference(shape: dict[str, object], dropout: dict[str, object]) -> None:
    """Its gradients are written out: they are those that autograd makes of the definition."""
    assert_equal_to_reference(make_problem(**shape), backend="reference", **dropout)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (8, 8), (4, 9)])
def test_panels_of_the_merged_form(
    shape: tuple[int, int], transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W_eff a few rows at a time: panels that divide its rows or columns, and that do not."""
    monkeypatch.setattr(eager, "MERGED_PANEL", 4)
    monkeypatch.setattr(eager, "MERGED_ALIGNMENT", 3)
    problem = make_problem(out_features=shape[0], in_features=shape[1], ranks=(2, 1), random_labels=True)
    if transposed:
        problem = replace(problem, weight=problem.weight.T.contiguous().T)
    assert_equal_to_reference(problem, algorithm="merged")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dropout", [{}, {"dropout_p": 0.4, "dropout_seed": torch.tensor(9, device=DEVICE)}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_panels_of_tokens(
    dtype: torch.dtype, dropout: dict[str, object], transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients are summed over panels of tokens, of which the last is short, in either memory order of W0."""
    for name in ("TOKEN_PANEL", "HALF_TOKEN_PANEL"):
        monkeypatch.setattr(eager, name, 4)
    problem = make_problem(tokens=11, ranks=(3, 0, 2), random_labels=True).to(dtype)
    if transposed:
        problem = replace(problem, weight=problem.weight.T.contiguous().T)
    truth = problem.to(torch.float64).run_reference(**dropout)
    baseline = problem.run_reference(**dropout)
    ours = problem.run(algorithm="split", backend="eager", **dropout)
    for name, value, same_dtype, exact in zip(
        ("y", "dx", "dA", "dB", "dbias"), ours, baseline, truth, strict=True
    ):
        assert error_over_budget(value, same_dtype, exact) <= 1, name
