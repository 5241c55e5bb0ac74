"""The operator in compilers, exporters and training loops: schemas, graphs, masks, mixed precision, eager's copies.

The promises of every backend are tested in tests/test_contract.py.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import needs_library
from problems import DEVICE, Case, LinearProblem, cases, each, in_orders, make_problem, relative_error
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch_calls import Calls

from smoa_kernels import FusedSMoALinear
from smoa_kernels.backends import eager, load_backend
from smoa_kernels.definition.dropout import Dropout
from smoa_kernels.definition.packed import PackedAdapter, scaling_tensor
from smoa_kernels.definition.precision import gemm_is_ieee
from smoa_kernels.definition.thresholds import Place
from smoa_kernels.operators.linear import LinearCall, linear_backward_operator, linear_operator

pytestmark = pytest.mark.numerical


def test_schema_and_bundle_agree() -> None:
    """`flatten` gives its values in the order of the schemas' names."""
    p, dropout = make_problem(), Dropout(torch.tensor(5), 0.25, 7)
    partition, scaling = p.partition, scaling_tensor(p.scaling, p.x.device)
    adapter = PackedAdapter(p.weight, p.A, p.B, partition, p.ranks, scaling, p.ranks.tolist(), Place(9))
    flat = LinearCall(adapter, dropout, "eager").flatten()
    arguments = [a.name for a in linear_operator._schema.arguments[3:]]
    assert arguments == [a.name for a in linear_backward_operator._schema.arguments[3:]]
    expected = {name: getattr(partition, name) for name in arguments if hasattr(partition, name)}
    expected |= {"weight": p.weight, "A": p.A, "B": p.B, "ranks": p.ranks, "block_ranks": p.ranks.tolist()}
    expected |= {"dropout_seed": dropout.seed, "dropout_p": 0.25, "column_offset": 7, "scaling": scaling}
    expected |= {"backend": "eager", "place": 9}
    given = dict(zip(arguments, flat, strict=True))
    assert given.keys() == expected.keys()
    for name, value in given.items():
        assert value is expected[name] or value == expected[name], name
    again = LinearCall.unflatten(*flat).flatten()
    assert all(a is b or a == b for a, b in zip(again, flat, strict=True))


def test_a_tensor_left_over_from_a_transform() -> None:
    p, left = make_problem(dtype=torch.float32, tokens=40), []
    torch.func.grad(lambda x: (left.append(2 * x), left[0].sum())[1])(p.x)
    expected = replace(p, x=2 * p.x).forward()
    for factors in (False, True):
        A, B = (factor.clone().requires_grad_(factors) for factor in (p.A, p.B))
        torch.testing.assert_close(replace(p, x=left[0], A=A, B=B).forward(), expected)


def test_a_gradient_of_zeros_that_are_nowhere() -> None:
    p = make_problem(dtype=torch.float32, tokens=40)
    x = p.x.clone().requires_grad_()
    y = replace(p, x=x).forward()
    zeros = torch._efficientzerotensor(y.shape, device=y.device)
    (dx,) = torch.autograd.grad(y, x, zeros)
    assert torch.equal(dx, torch.zeros_like(dx))


class Block(nn.Module):
    """The surroundings of a layer in a transformer."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(40)
        self.up = FusedSMoALinear(40, 33, r=6, num_blocks=2, dropout=dropout)
        self.down = FusedSMoALinear(33, 40, r=4, num_blocks=3)
        for layer in (self.up, self.down):
            nn.init.normal_(layer.smoa.B, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def run(block: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    for parameter in block.parameters():
        parameter.grad = None
    y = block(x)
    y.square().sum().backward()
    return (y.detach(), *(p.grad for p in block.parameters() if p.grad is not None))


@contextmanager
def needs_a_compiler() -> Iterator[None]:
    """Skips the test where inductor finds no C++ compiler."""
    try:
        yield
    except Exception as error:
        if "compiler" not in str(error).lower():
            raise
        pytest.skip(f"inductor needs a C++ compiler: {error}")


@pytest.mark.slow
def test_inductor_compiles_it() -> None:
    torch.manual_seed(0)
    block = Block()
    x = torch.randn(64, 40)
    expected = run(block, x)
    with needs_a_compiler():
        result = run(torch.compile(block, fullgraph=True), x)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dynamic", "graphs"),
    [(True, 1), (None, 2), (False, 1)],  # None: torch itself widens one token count to any
)
def test_scaling_seed_and_token_count_recompile_nothing(dynamic: bool | None, graphs: int) -> None:
    counters.clear()
    block = Block(dropout=0.2)
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens, scaling in ((8, 1.0), (8, 0.3), (8, 2.0), (1024, 0.5), (17, 2.0), (300, 1.0), (2, 1.0)):
        block.up.scaling = scaling
        torch.manual_seed(tokens)
        x = torch.randn(8 if dynamic is False else tokens, 40)
        torch.manual_seed(tokens)
        y = run(compiled, x)[0]
        torch.manual_seed(tokens)
        torch.testing.assert_close(y, run(block, x)[0])
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@pytest.mark.parametrize("ahead_of_time", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_exports_an_inference_graph(ahead_of_time: bool, tmp_path: Path) -> None:
    """The graph as it is, or compiled by AOTInductor."""
    torch.manual_seed(0)
    block, x = Block().eval(), torch.randn(9, 40)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(block, (x,), dynamic_shapes=({0: tokens},))
    assert sum(node.target is linear_operator for node in program.graph.nodes) == 2
    run: Any = program.module()
    if ahead_of_time:
        with needs_a_compiler():
            package = torch._inductor.aoti_compile_and_package(program, package_path=f"{tmp_path}/block.pt2")
        run = torch._inductor.aoti_load_package(package)
    with torch.no_grad():
        for count in (9, 64):
            x = torch.randn(count, 40)
            torch.testing.assert_close(run(x), block(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_trace_holds_the_operator(tmp_path: Path) -> None:
    """A trace with an autograd function instead could not be saved."""
    layer, x = FusedSMoALinear.from_linear(nn.Linear(8, 6), r=4, num_blocks=2), torch.randn(3, 8)
    torch.jit.save(torch.jit.trace(layer, x), str(tmp_path / "layer.pt"))
    assert torch.equal(torch.jit.load(str(tmp_path / "layer.pt"))(x), layer(x))


@pytest.mark.parametrize("backend", ["eager", pytest.param("native", marks=needs_library)])
def test_where_compiling_gives_up_the_kernels_are_not_traced(backend: str) -> None:
    layer = FusedSMoALinear(64, 48, backend=backend)
    nn.init.normal_(layer.smoa.B)
    x = torch.randn(5, 64)

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: layer(x).square().sum())(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo warns of code that it cannot trace
        found = torch.compile(gradient, backend="aot_eager")(x)
    torch.testing.assert_close(found, gradient(x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_frozen_layer_within_a_compiled_transform(backend: str) -> None:
    layer, x, z = FusedSMoALinear(64, 48).requires_grad_(False), torch.randn(5, 64), torch.randn(5, 48)

    def gradient(z: Tensor) -> Tensor:
        return torch.func.grad(lambda z: (layer(x) * z).square().sum())(z)

    torch.testing.assert_close(torch.compile(gradient, backend=backend)(z), gradient(z))


def test_a_compiled_forward_mode_derivative_is_never_zero_in_silence() -> None:
    layer = FusedSMoALinear(64, 48)
    nn.init.normal_(layer.smoa.B)
    x = torch.randn(5, 64)
    with pytest.raises(RuntimeError):
        torch.compile(lambda x: torch.func.jvp(layer, (x,), (x,))[1], backend="aot_eager")(x)


def test_the_operator_itself_has_a_forward_mode_derivative() -> None:
    layer = FusedSMoALinear(64, 48)
    nn.init.normal_(layer.smoa.B)
    x, t = torch.randn(2, 5, 64)
    call = LinearCall(layer._packed(), None, "eager")
    with forward_ad.dual_level():
        y = linear_operator(forward_ad.make_dual(x, t), None, "auto", *call.flatten())
        tangent = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, layer(t) - layer(torch.zeros_like(t)))


# In training


def test_compiled_checkpointing_recomputes_with_the_same_mask() -> None:
    torch.manual_seed(0)
    block, x = Block(dropout=0.3), torch.randn(12, 40, requires_grad=True)

    def recomputed(x):
        return checkpoint(block, x, use_reentrant=False)

    again = torch.compile(recomputed, fullgraph=True, backend="aot_eager")
    found = []
    for function, seed in ((block, 1), (again, 1), (block, 2)):
        torch.manual_seed(seed)
        y = function(x)
        wanted = [x, *(p for p in block.parameters() if p.requires_grad)]
        found.append((y, *torch.autograd.grad(y.square().sum(), wanted)))
    for expected, ours, different in zip(*found, strict=True):
        assert torch.equal(ours, expected)
        assert not torch.equal(ours, different)


def test_loss_scaling_under_autocast() -> None:
    """float16 autocast with GradScaler: float32 factors step as without scaling; an overflow skips the step."""
    torch.manual_seed(0)
    block, x = Block(), torch.randn(64, 40)
    factors = [p for p in block.parameters() if p.requires_grad and p.ndim == 2]
    with torch.autocast(DEVICE.type, dtype=torch.float16):
        loss = block(x).float().square().mean()
    plain = torch.autograd.grad(loss, factors)
    optimizer, before = torch.optim.SGD(factors, lr=0.1), [p.detach().clone() for p in factors]
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=256.0)
    with torch.autocast(DEVICE.type, dtype=torch.float16):
        loss = block(x).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    for factor, old, gradient in zip(factors, before, plain, strict=True):
        assert factor.grad is not None
        assert factor.grad.dtype == torch.float32
        assert relative_error((old - factor) / 0.1, gradient) < 2e-2  # float16 gradients in both
    changed = [p.detach().clone() for p in factors]
    optimizer.zero_grad()
    with torch.autocast(DEVICE.type, dtype=torch.float16):
        scaler.scale(block(x).float().square().mean() * 1e30).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 256
    assert all(torch.equal(p, old) for p, old in zip(factors, changed, strict=True))


FORBIDDEN = {
    "_local_scalar_dense",
    "is_nonzero",
    *("nonzero", "equal", "masked_select", "unique", "bincount"),
}
"""Operators that make the host wait for a GPU: they read a value, or a size that depends on values."""


def layer_of(kind: str, backend: str, dropout: float) -> nn.Module:
    torch.manual_seed(0)
    if kind in ("auto", "split"):
        options = {"dropout": dropout, "backend": backend, "algorithm": kind}
        return FusedSMoALinear(40, 33, r=7, num_blocks=3, **options)
    peft = pytest.importorskip("peft", reason="needs the peft extra")
    from smoa_kernels.peft import SMoAConfig

    settings = {"r": 7, "smoa_dropout": dropout, "target_modules": ["0"], "backend": backend}
    model = peft.get_peft_model(nn.Sequential(nn.Linear(40, 33)), SMoAConfig(num_blocks=3, **settings))
    if kind == "two adapters":
        model.add_adapter("other", SMoAConfig(num_blocks=2, **settings))
        model.base_model.set_adapter(["default", "other"])
    return model


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda_graphs.py shows it on the GPU itself")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("tokens", [2, 20])  # the forms for few and for many tokens
@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["auto", "split", "peft", "two adapters"])
def test_nothing_is_read_on_the_host(
    kind: str, backend: str, tokens: int, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="the kernels run in Triton's interpreter here")
    layer = layer_of(kind, backend, dropout)
    x = torch.randn(tokens, 40, requires_grad=True)
    layer(x).sum().backward()  # one-time work happens here
    original = Tensor.tolist

    def tolist(self: Tensor) -> list[object]:
        caller = sys._getframe(1).f_code.co_name
        # It reads on the CPU only.
        assert caller.endswith("check_ranks"), f"{caller} waits for a GPU"
        return original(self)

    monkeypatch.setattr(Tensor, "tolist", tolist)
    with Calls() as calls:
        layer(x).sum().backward()
    assert not FORBIDDEN & calls.names


# The eager backend: its choice of algorithm, and copies that it avoids


def test_auto_chooses_by_the_multiplying_dtype() -> None:
    choose = eager.choose_algorithm
    assert choose(4096, 16, torch.float32, tf32=False, dropout=False) == "merged"
    assert choose(4096, 16, torch.float32, tf32=True, dropout=False) == "split"
    assert choose(4096, 16, torch.float32, tf32=False, dropout=True) == "split"
    assert choose(1, 16, torch.float32, tf32=False, dropout=False) == "expanded"
    assert choose(4, 16, torch.float32, tf32=False, dropout=False) == "merged"
    assert choose(4, 16, torch.bfloat16, tf32=False, dropout=False) == "expanded"
    assert choose(4096, 16, torch.bfloat16, tf32=False, dropout=False) == "merged"
    assert choose(1, 16, torch.float32, tf32=True, dropout=False) == "expanded"
    assert choose(1, 16, torch.float32, tf32=False, dropout=True) == "split"


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


BY_INDEX = {
    *("gather", "index", "index_copy", "index_put", "index_select", "scatter", "take", "take_along_dim"),
    *("index_copy_", "index_put_", "scatter_"),
}


def copies(p: LinearProblem, case: Case) -> set[str]:
    """The operators that reorder rows or columns in forward and backward."""
    adapter = p.adapter()
    backend, dropout = load_backend(case.backend), case.dropout
    with Calls() as calls:
        backend.forward(p.x, p.bias, adapter, "split" if dropout else case.algorithm, dropout)
        backend.backward(p.dy, p.x, adapter, dropout, needs_x=True)
    return BY_INDEX & calls.names


def contiguous(backend: str) -> list[Case]:
    """Cases of the eager backend only, because compiled code calls no torch operators."""
    return in_orders(cases(backend), "contiguous") if backend == "eager" else []


@each(contiguous)
def test_contiguous_blocks_are_slices(case: Case) -> None:
    """x, dY, W0 and the factors are sliced, not gathered."""
    assert not copies(case.problem(tokens=50), case)
    assert copies(replace(case, order="random").problem(tokens=50), case)
