"""The `smoa::linear` operator as the compiler and the exporter see it."""

import warnings
from dataclasses import replace

import pytest
import torch
from compiled import needs_library
from problems import make_problem
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.autograd import forward_ad

from smoa_kernels import FusedSMoALinear
from smoa_kernels.definition.dropout import Dropout
from smoa_kernels.definition.packed import PackedAdapter, scaling_tensor
from smoa_kernels.operator import LinearCall, linear, linear_backward

pytestmark = pytest.mark.numerical


def test_schema_and_bundle_agree() -> None:
    """`flatten` gives its values in the order of the schemas' names."""
    p, dropout = make_problem(), Dropout(torch.tensor(5), 0.25, 7, 400)
    partition, scaling = p.partition, scaling_tensor(p.scaling, p.x.device)
    adapter = PackedAdapter(p.weight, p.A, p.B, partition, p.ranks, scaling, p.ranks.tolist())
    flat = LinearCall(adapter, dropout, "eager").flatten()
    arguments = [a.name for a in linear._schema.arguments[3:]]
    assert arguments == [a.name for a in linear_backward._schema.arguments[3:]]
    expected = {name: getattr(partition, name) for name in arguments if hasattr(partition, name)}
    expected |= {"weight": p.weight, "A": p.A, "B": p.B, "ranks": p.ranks, "block_ranks": p.ranks.tolist()}
    expected |= {"dropout_seed": dropout.seed, "dropout_p": 0.25, "column_offset": 7, "scaling": scaling}
    expected |= {"global_in_features": 400, "backend": "eager", "block_sizes": partition.sizes()}
    given = dict(zip(arguments, flat, strict=True))
    assert given.keys() == expected.keys()
    for name, value in given.items():
        assert value is expected[name] or value == expected[name], name
    again = LinearCall.unflatten(*flat).flatten()
    assert all(a is b or a == b for a, b in zip(again, flat, strict=True))


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
            nn.init.normal_(layer.smoa_B, std=0.1)

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


@pytest.mark.slow
def test_inductor_compiles_it() -> None:
    torch.manual_seed(0)
    block = Block()
    x = torch.randn(64, 40)
    expected = run(block, x)
    try:
        result = run(torch.compile(block, fullgraph=True), x)
    except torch._inductor.exc.InductorError as error:  # this machine has no C++ compiler
        if "compiler" not in str(error).lower():
            raise
        pytest.skip(f"inductor needs a C++ compiler: {error}")
    for ours, eager in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


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


def test_exports_an_inference_graph() -> None:
    block = Block().eval()
    x = torch.randn(9, 40)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(block, (x,), dynamic_shapes=({0: tokens},))
    assert sum(node.target is linear for node in program.graph.nodes) == 2
    with torch.no_grad():
        for count in (9, 64):
            x = torch.randn(count, 40)
            torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.parametrize("backend", ["eager", pytest.param("native", marks=needs_library)])
def test_where_compiling_gives_up_the_kernels_are_not_traced(backend: str) -> None:
    layer = FusedSMoALinear(64, 48, backend=backend)
    nn.init.normal_(layer.smoa_B)
    x = torch.randn(5, 64)

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: layer(x).square().sum())(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo warns of code that it cannot trace
        found = torch.compile(gradient, backend="aot_eager")(x)
    torch.testing.assert_close(found, gradient(x))


def test_a_compiled_forward_mode_derivative_is_never_zero_in_silence() -> None:
    layer = FusedSMoALinear(64, 48)
    nn.init.normal_(layer.smoa_B)
    x = torch.randn(5, 64)
    with pytest.raises(RuntimeError):
        torch.compile(lambda x: torch.func.jvp(layer, (x,), (x,))[1], backend="aot_eager")(x)


def test_the_operator_itself_has_a_forward_mode_derivative() -> None:
    layer = FusedSMoALinear(64, 48)
    nn.init.normal_(layer.smoa_B)
    x, t = torch.randn(2, 5, 64)
    call = LinearCall(layer._packed(), None, "eager")
    with forward_ad.dual_level():
        y = linear(forward_ad.make_dual(x, t), None, "auto", *call.flatten())
        tangent = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, layer(t) - layer(torch.zeros_like(t)))
