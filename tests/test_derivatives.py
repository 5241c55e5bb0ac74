"""`torch.func` transforms, second derivatives and forward mode, compared with an `nn.Linear` that holds W_eff."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import if_it_runs, relative_error, unsupported_reason
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from smoa_kernels import (
    FusedSMoAConv1d,
    FusedSMoAConv2d,
    FusedSMoAConv3d,
    FusedSMoAEmbedding,
    FusedSMoALinear,
)
from smoa_kernels.backends import convolution, load_backend
from smoa_kernels.definition.packed import PackedAdapter
from smoa_kernels.definition.reference import delta_weight
from smoa_kernels.functional import modulate

Parameters = dict[str, Tensor]
Loss = Callable[[Parameters, Tensor], Tensor]

BACKENDS = [*map(if_it_runs, ("eager", "native", "reference"))]


def make_layer(backend: str = "eager", seed: int = 0, **settings: Any) -> FusedSMoALinear:
    torch.manual_seed(seed)
    dtype = torch.float32 if backend == "native" else torch.float64
    base = nn.Linear(13, 9, dtype=dtype)
    layer = FusedSMoALinear.from_linear(base, r=4, num_blocks=2, backend=backend, **settings)
    nn.init.normal_(layer.smoa.B, std=0.3)
    return layer


def parameters(layer: FusedSMoALinear) -> Parameters:
    return {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}


def ours(layer: FusedSMoALinear) -> Loss:
    return lambda given, x: functional_call(layer, given, (x,))


def linear(layer: FusedSMoALinear) -> Loss:
    """The same layer from W_eff, in plain operators."""

    def forward(given: Parameters, x: Tensor) -> Tensor:
        A, B = given["smoa.A"], given["smoa.B"]
        blocks = layer.partition, layer.smoa.ranks
        adapter = PackedAdapter(layer.weight, A, B, *blocks, layer.smoa.scaling)
        return F.linear(x, layer.weight + delta_weight(adapter), layer.bias)

    return forward


def loss(forward: Loss) -> Loss:
    return lambda given, x: forward(given, x).sin().sum()


def second(forward: Loss) -> Loss:
    """The norm of a gradient; its gradient is a second derivative."""

    def norm(given: Parameters, x: Tensor) -> Tensor:
        found = grad(loss(forward), argnums=(0, 1))(given, x)
        return sum(part.square().sum() for part in (*found[0].values(), found[1]))

    return norm


def stacked(given: Parameters) -> Parameters:
    return {name: torch.stack([value, 2 * value, value.cos()]) for name, value in given.items()}


TRANSFORMS: dict[str, Callable[[Loss, Parameters, Tensor], Any]] = {
    "grad": lambda f, given, x: grad(loss(f), argnums=(0, 1))(given, x),
    "vjp": lambda f, given, x: vjp(f, given, x)[1](torch.ones(5, 9, dtype=x.dtype)),
    "vmap": lambda f, given, x: vmap(f, (None, 1), 1)(given, torch.stack([x, 2 * x], 1)),
    "vmap of single tokens": lambda f, given, x: vmap(f, (None, 0))(given, x),
    "per-sample gradients": lambda f, given, x: vmap(grad(loss(f)), (None, 0))(given, x),
    "per-sample gradients in x": lambda f, given, x: vmap(grad(loss(f), argnums=1), (None, 0))(given, x),
    "vmap of factors": lambda f, given, x: vmap(f, (0, None))(stacked(given), x),
    "vmap of both": lambda f, given, x: vmap(f, (0, 0))(stacked(given), torch.stack([x, x.cos(), -x])),
    "gradients of an ensemble": lambda f, given, x: vmap(grad(loss(f)), (0, None))(stacked(given), x),
    "gradient of a vmap": lambda f, given, x: grad(lambda g: vmap(f, (None, 0))(g, x).sin().sum())(given),
    "jvp": lambda f, given, x: jvp(f, (given, x), (given, x.cos())),
    "jvp of a vmap": lambda f, given, x: jvp(lambda x: vmap(f, (None, 0))(given, x), (x,), (x.cos(),)),
    "jacrev": lambda f, given, x: jacrev(f, argnums=(0, 1))(given, x),
    "jacfwd": lambda f, given, x: jacfwd(f, argnums=(0, 1))(given, x),
    "hessian": lambda f, given, x: hessian(loss(f), argnums=(0, 1))(given, x),
    "reverse over reverse": lambda f, given, x: grad(second(f), argnums=(0, 1))(given, x),
    "third": lambda f, given, x: grad(lambda x: grad(second(f), argnums=1)(given, x).sin().sum())(x),
    "per-sample second": lambda f, given, x: vmap(grad(second(f)), (None, 0))(given, x),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_agrees_with_a_linear_layer(transform: str, backend: str) -> None:
    layer = make_layer(backend)
    x = torch.randn(5, 13, dtype=layer.weight.dtype)
    found = TRANSFORMS[transform](ours(layer), parameters(layer), x)
    wanted = TRANSFORMS[transform](linear(layer), parameters(layer), x)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_derivatives_of_autograd(backend: str, order: int) -> None:
    layer = make_layer(backend)
    x = torch.randn(5, 13, dtype=layer.weight.dtype)

    def derivatives(forward: Loss) -> list[Tensor]:
        given = {name: value.clone().requires_grad_() for name, value in parameters(layer).items()}
        leaves = [*given.values(), x.clone().requires_grad_()]
        value = forward(given, leaves[-1]).sin().sum()
        for _ in range(order):
            found = torch.autograd.grad(value, leaves, create_graph=True)
            value = sum(part.square().sum() for part in found)
        return [part.detach() for part in found]

    torch.testing.assert_close(derivatives(ours(layer)), derivatives(linear(layer)))


@pytest.mark.parametrize("name", ["x", "smoa.A", "smoa.B"])
@pytest.mark.parametrize("trains", [False, True])
def test_forward_mode(name: str, trains: bool) -> None:
    layer = make_layer().requires_grad_(False)
    layer.smoa.A.requires_grad_(trains)
    given, x = parameters(make_layer()), torch.randn(2, 5, 13, dtype=torch.float64)

    def tangent(forward: Loss) -> Tensor:
        with forward_ad.dual_level():
            duals = {**given, "x": x}
            duals[name] = forward_ad.make_dual(duals[name], duals[name].cos())
            y = forward(duals, duals.pop("x"))
            found: Tensor = forward_ad.unpack_dual(y).tangent
            return found

    torch.testing.assert_close(tangent(ours(layer)), tangent(linear(layer)))
    with forward_ad.dual_level():  # the layer has no dual input
        assert layer(x).isfinite().all()


def test_an_ensemble_of_layers_with_blocks_of_their_own() -> None:
    layers = [make_layer(seed=seed) for seed in range(3)]
    assert not torch.equal(layers[0].smoa.row_block, layers[1].smoa.row_block)
    x = torch.randn(5, 13, dtype=torch.float64)
    states = stack_module_state(layers)
    y = vmap(lambda *state: functional_call(layers[0], state, (x,)))(
        *[{name: value.detach() for name, value in state.items()} for state in states]
    )
    torch.testing.assert_close(y, torch.stack([layer(x) for layer in layers]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_activations_is_one_call(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, calls = make_layer(backend), []
    module = load_backend(backend)
    for name in ("forward", "backward"):
        true = getattr(module, name)

        def counted(first: Tensor, *args: Any, true: Any = true, name: str = name, **kwargs: Any) -> Any:
            calls.append((name, len(first)))
            return true(first, *args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    x = torch.randn(4, 5, 13, dtype=layer.weight.dtype)
    vmap(grad(lambda x: layer(x).sin().sum()))(x)
    assert calls == [("forward", 20), ("backward", 20)]


def test_dropout_under_transforms() -> None:
    layer = make_layer(dropout=0.4)
    x = torch.randn(6, 13, dtype=torch.float64)

    def seeded(function: Callable[[], Any]) -> Any:
        torch.manual_seed(1)
        return function()

    def plain() -> tuple[Tensor, ...]:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(layer(leaf).sin().sum(), (leaf, layer.smoa.A, layer.smoa.B))

    def transformed() -> tuple[Tensor, ...]:
        given, dx = grad(loss(ours(layer)), argnums=(0, 1))(parameters(layer), x)
        return dx, given["smoa.A"], given["smoa.B"]

    torch.testing.assert_close(seeded(transformed), seeded(plain))
    y = seeded(lambda: layer(x))
    torch.testing.assert_close(seeded(lambda: jvp(layer, (x,), (x,)))[0], y)
    both = vmap(layer, randomness="same")
    torch.testing.assert_close(seeded(lambda: both(torch.stack([x, x]))), torch.stack([y, y]))
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(layer)(torch.stack([x, x]))
    with pytest.raises(ValueError, match="randomness='same'"):
        vmap(layer, randomness="different")(torch.stack([x, x]))


def test_the_kernels_under_transforms_with_dropout() -> None:
    if (reason := unsupported_reason("triton", torch.float32)) is not None:
        pytest.skip(reason)
    base = nn.Linear(13, 9)
    layer = FusedSMoALinear.from_linear(base, r=4, num_blocks=2, backend="triton", dropout=0.4)
    nn.init.normal_(layer.smoa.B)
    x = torch.randn(5, 13)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    again, tangent = jvp(layer, (x,), (x,))
    torch.testing.assert_close(again, y)
    torch.testing.assert_close(tangent, y - base.bias)  # y is affine in x


def test_a_frozen_weight_is_not_differentiated() -> None:
    layer = make_layer()
    everything = {name: p.detach() for name, p in layer.named_parameters()}
    with pytest.raises(ValueError, match="weight must be frozen"):
        grad(loss(ours(layer)))(everything, torch.randn(5, 13, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_under_autocast(backend: str) -> None:
    layer = FusedSMoALinear.from_linear(nn.Linear(13, 9), r=4, num_blocks=2, backend=backend)
    nn.init.normal_(layer.smoa.B, std=0.3)
    x, found = torch.randn(5, 13, requires_grad=True), []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            gradients = torch.autograd.grad(
                layer(x).float().sin().sum(), [x, layer.smoa.A, layer.smoa.B], create_graph=True
            )
            second = torch.autograd.grad(sum(one.float().square().sum() for one in gradients), layer.smoa.A)
        found.append(second[0])
    torch.testing.assert_close(*found, rtol=0.1, atol=0.1 * found[1].abs().max().item())


def test_float32_factors_over_half_precision() -> None:
    layer = FusedSMoALinear.from_linear(nn.Linear(13, 9).to(torch.bfloat16), r=4, num_blocks=2)
    layer.smoa.A.data, layer.smoa.B.data = layer.smoa.A.data.float(), torch.randn(9, layer.smoa.A.shape[0])
    x = torch.randn(5, 13, dtype=torch.bfloat16)
    found = vmap(grad(loss(ours(layer))), (None, 0))(parameters(layer), x)
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            for sample, gradient in zip(x, found[name], strict=True):
                (wanted,) = torch.autograd.grad(layer(sample).sin().sum(), parameter)
                torch.testing.assert_close(gradient, wanted, rtol=0.03, atol=0.03)


# W_eff as a function of the factors, for layers of any kind


def packed(layer: FusedSMoALinear, **changes: Any) -> PackedAdapter:
    return replace(layer._packed(), **changes)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("block_order", ["spectral", "contiguous"])
def test_modulate_is_the_merged_weight_with_the_factors_gradients(block_order: str) -> None:
    layer = make_layer(block_order=block_order)
    A, B = layer.smoa.A, layer.smoa.B
    W_eff = modulate(packed(layer, A=A, B=B))
    layer.merge()
    assert torch.equal(W_eff, layer.weight)
    layer.unmerge()

    def function(A: Tensor, B: Tensor) -> Tensor:
        return modulate(packed(layer, A=A, B=B))

    assert torch.autograd.gradcheck(function, (A, B))
    assert torch.autograd.gradgradcheck(function, (A, B))
    batch = torch.stack([B, 2 * B]).detach()
    both = vmap(lambda B: function(A.detach(), B))(batch)
    torch.testing.assert_close(both, torch.stack([function(A, each) for each in batch]))
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(A, B), W_eff)


def test_modulate_rounds_as_the_layer_and_its_gradient_ignores_the_rounding() -> None:
    layer = make_layer().bfloat16()
    A, B = layer.smoa.A, layer.smoa.B
    dW = torch.randn_like(layer.weight)
    found = [modulate(packed(layer, A=A, B=B))]
    with torch.profiler.profile():  # the plain operators
        found.append(modulate(packed(layer, A=A, B=B)))
    wide = copy.deepcopy(layer).double()
    expected = torch.autograd.grad(
        modulate(packed(wide, A=wide.smoa.A, B=wide.smoa.B)), (wide.smoa.A, wide.smoa.B), dW.double()
    )
    for W_eff in found:
        for ours, exact in zip(torch.autograd.grad(W_eff, (A, B), dW), expected, strict=True):
            assert relative_error(ours, exact) < 2**-8
    layer.merge()
    for W_eff in found:
        assert torch.equal(W_eff, layer.weight)


def test_a_convolution_by_modulate_is_hira() -> None:
    """With K = 1 and s = 1: `W0 ∘ (1 + BA)` over W0 as (out, in · height · width)."""
    conv = nn.Conv2d(3, 8, 3, dtype=torch.float64).requires_grad_(False)
    flat = FusedSMoALinear.from_linear(nn.Linear(27, 8, dtype=torch.float64), r=2, num_blocks=1)
    nn.init.normal_(flat.smoa.B)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    adapter = packed(flat, weight=conv.weight.flatten(1), A=flat.smoa.A, B=flat.smoa.B)
    y = nn.functional.conv2d(x, modulate(adapter).view_as(conv.weight), conv.bias)
    hira = conv.weight * (1 + (flat.smoa.B @ flat.smoa.A).view_as(conv.weight))
    expected = nn.functional.conv2d(x, hira, conv.bias)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-12)
    factors = flat.smoa.A, flat.smoa.B
    gradients = (torch.autograd.grad(one.sum(), factors) for one in (y, expected))
    for ours, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)


def test_a_parametrization_by_modulate_trains() -> None:
    layer = make_layer()

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A, self.B = (nn.Parameter(one.detach().clone()) for one in (layer.smoa.A, layer.smoa.B))

        def forward(self, weight: Tensor) -> Tensor:
            return modulate(packed(layer, weight=weight, A=self.A, B=self.B))

    plain = nn.Linear(layer.in_features, layer.out_features, dtype=torch.float64).requires_grad_(False)
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    torch.nn.utils.parametrize.register_parametrization(plain, "weight", Adapted())
    x = torch.randn(5, layer.in_features, dtype=torch.float64)
    for one in (plain, layer):
        one(x).square().sum().backward()
    ours = plain.parametrizations.weight[0]
    torch.testing.assert_close(plain(x), layer(x))
    torch.testing.assert_close(ours.A.grad, layer.smoa.A.grad)
    torch.testing.assert_close(ours.B.grad, layer.smoa.B.grad)


def test_a_layer_keeps_no_tensor_of_a_transform() -> None:
    layer, x = make_layer(), torch.randn(3, 13, dtype=torch.float64)
    expected = layer(x)
    grad(loss(ours(layer)))(parameters(layer), x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert layer.smoa._kept is not None
    assert layer.smoa._kept.A is layer.smoa.A


CONVOLUTIONS = {
    "1d": (FusedSMoAConv1d, (4, 7, 3), {"stride": 2, "padding": 2}, (3, 4, 11)),
    "2d": (FusedSMoAConv2d, (4, 7, (3, 2)), {"stride": (1, 2), "padding": (2, 0), "dilation": (1, 3)}, (2, 4, 7, 8)),
    "pointwise": (FusedSMoAConv2d, (5, 4, 1), {}, (2, 5, 3, 4)),
    "3d": (FusedSMoAConv3d, (3, 5, 2), {"padding": 1, "bias": False}, (2, 3, 3, 4, 2)),
}  # fmt: skip


@pytest.mark.parametrize("pixels", [512, 20, 1])
@pytest.mark.parametrize("order", ["spectral", "contiguous"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_of_a_convolution_only_the_blocks_gradient_is_computed(
    kind: str, order: str, pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over gathered windows of x, a panel of pixels at a time; the same as by torch's operators."""
    monkeypatch.setattr(convolution, "PIXEL_PANEL", pixels)
    torch.manual_seed(0)
    make, sizes, options, shape = CONVOLUTIONS[kind]
    layer = make(*sizes, **options, r=5, num_blocks=3, block_order=order, dtype=torch.float64)
    nn.init.normal_(layer.smoa.B)
    leaves = {"smoa.A": layer.smoa.A, "smoa.B": layer.smoa.B}
    if layer.bias is not None:
        leaves["bias"] = layer.bias.requires_grad_()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert type(y.grad_fn).__name__ == "_ConvolveBackward"
    expected, pull = vjp(lambda given, x: functional_call(layer, given, (x,)), leaves, x)
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(y, expected, **close)
    dy = torch.randn_like(y)
    given, dx = pull(dy)
    found = torch.autograd.grad(y, (*leaves.values(), x), dy)
    torch.testing.assert_close(found, (*given.values(), dx), **close)
    half = torch.autograd.grad(layer(x.detach()), layer.smoa.B, dy)[0]  # without dX
    torch.testing.assert_close(half, given["smoa.B"], **close)


def test_second_derivatives_of_a_convolution() -> None:
    torch.manual_seed(0)
    layer = FusedSMoAConv2d(2, 4, (3, 2), stride=2, padding=1, r=3, num_blocks=2, dtype=torch.float64)
    nn.init.normal_(layer.smoa.B)
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda x, *_: layer(x), (x, layer.smoa.A, layer.smoa.B, layer.bias.requires_grad_())
    )


@pytest.mark.parametrize("shape", [(0, 1, 5, 5), (2, 1, 5, 5)])
def test_gradients_of_a_convolution_without_images_and_of_a_dimension_without_a_step(
    shape: tuple[int, ...],
) -> None:
    """numpy's `images[:, None]` has a step of 0."""
    torch.manual_seed(0)
    layer = FusedSMoAConv2d(1, 6, 3, r=3, num_blocks=2, dtype=torch.float64)
    nn.init.normal_(layer.smoa.B)
    x = torch.randn(shape, dtype=torch.float64)
    expected = torch.autograd.grad(layer(x).square().sum(), (layer.smoa.A, layer.smoa.B))
    stepless = x.as_strided(shape, (25, 0, 5, 1)).requires_grad_()
    found = torch.autograd.grad(layer(stepless).square().sum(), (layer.smoa.A, layer.smoa.B, stepless))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "embedding"])
def test_forward_mode_of_layers_that_are_not_linear(kind: str) -> None:
    torch.manual_seed(0)
    layer: Any = {
        "conv1d": lambda: FusedSMoAConv1d(4, 6, 3, groups=2, r=3, dtype=torch.float64),
        "conv2d": lambda: FusedSMoAConv2d(4, 6, 3, r=3, dtype=torch.float64),
        "embedding": lambda: FusedSMoAEmbedding(4, 6, r=3, dtype=torch.float64),
    }[kind]()
    nn.init.normal_(layer.smoa.B)
    shape = {"conv1d": (2, 4, 5), "conv2d": (2, 4, 5, 5)}.get(kind)
    x = torch.arange(4) if shape is None else torch.randn(shape, dtype=torch.float64)
    B, tangent = layer.smoa.B.detach(), torch.randn_like(layer.smoa.B)
    y, found = jvp(lambda B: functional_call(layer, {"smoa.B": B}, (x,)), (B,), (tangent,))
    at_zero, there = (functional_call(layer, {"smoa.B": one}, (x,)) for one in (torch.zeros_like(B), tangent))
    torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(found, there - at_zero)  # y is affine in B
