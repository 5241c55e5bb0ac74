"""Bad arguments of `FusedSMoALinear`, layers that it cannot adapt, and state dicts that it must refuse."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import make_problem
from torch import nn

from smoa_kernels import FusedSMoALinear

from .harness import HUGE, SETTINGS, Call, Change, Row, World, check, one, rows

LAYER: list[Row] = [
    (lambda w: w.layer(torch.randn(3, 41)), ValueError, "x must have 40 features"),
    (
        lambda _: FusedSMoALinear.from_linear(nn.Conv2d(3, 3, 3)),
        TypeError,
        "transformers Conv1D .* got Conv2d",
    ),
    (lambda _: FusedSMoALinear.from_linear(None), TypeError, "got NoneType"),  # type: ignore[arg-type]
    (lambda _: FusedSMoALinear(0, 33), ValueError, "in_features must be at least 1, got 0"),
    (lambda _: FusedSMoALinear(40, 33, dtype=torch.int64), TypeError, "dtype must be floating point"),
    (lambda _: FusedSMoALinear(40, 33, device="nodev"), ValueError, "device must be one that this machine"),
    (lambda _: FusedSMoALinear(HUGE, 33), ValueError, "in_features must be at most 2147483647"),
    (lambda _: FusedSMoALinear(40, 33, torch.ones(33)), TypeError, "bias must be a bool, got Tensor"),  # type: ignore[arg-type]
    (lambda w: setattr(w.layer, "scaling", float("nan")), ValueError, "scaling must be finite, got nan"),
    (lambda w: setattr(w.layer, "alpha", float("inf")), ValueError, "alpha must be finite, got inf"),
    (lambda w: setattr(w.layer, "partition", None), TypeError, "partition must be a BlockPartition"),
    (lambda w: setattr(w.layer, "partition", w.problem.partition), ValueError, "partition must be made for"),
    (lambda w: w.layer.load_state_dict([]), TypeError, "state_dict to be dict-like"),  # type: ignore[arg-type]
    (lambda w: w.layer.load_state_dict({5: one(1)}), TypeError, "keys of a state dict must be strings"),  # type: ignore[dict-item]
    (lambda w: w.layer.load_state_dict({}), ValueError, "the state dict lacks bias, weight"),
    (lambda w: FusedSMoALinear.from_linear(w.layer), TypeError, "linear must .* got FusedSMoALinear"),
    (
        lambda _: FusedSMoALinear.from_linear(type("Double", (nn.Linear,), {"forward": abs})(4, 4)),
        TypeError,
        "linear must .* the forward of that class .* got Double",
    ),
    (
        lambda _: FusedSMoALinear.from_linear(nn.MultiheadAttention(8, 2).out_proj),
        TypeError,
        "got NonDynamicallyQuantizableLinear; smoa_kernels.peft adapts .* nn.MultiheadAttention",
    ),
]


@rows("call", LAYER)
def test_methods(call: Call, error: type[Exception], words: str, world: World) -> None:
    check(world, call, error, words)


OWN_SETTINGS: list[Change] = [
    ({"num_blocks": 34, "r": 40}, ValueError, "num_blocks must be at most .* = 33 .*, got 34"),
    ({"granule": 33}, ValueError, "granule must leave at least num_blocks=2 .* leaves 1 and 2"),
    ({"block_ranks": [4.0, 4]}, TypeError, "block_ranks must be a list of ints"),
    ({"block_ranks": [4, 5]}, ValueError, "block_ranks must .* sum to r=8, got 2 that sum to 9: .4, 5."),
    ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
    ({"alpha": float("nan")}, ValueError, "alpha must be finite"),
    ({"strict_base": "no"}, TypeError, "strict_base must be a bool, got str"),
]
BLOCKS: list[Change] = [
    ({"use_lora_rate": 1}, TypeError, "use_lora_rate must be a bool, got int"),
    ({"partition": "x"}, TypeError, "partition must be a BlockPartition, got str"),
    ({"partition": make_problem().partition}, ValueError, r"partition must be .*\(33, 40\).* 2 blocks"),
]


@rows("settings", [*SETTINGS, *OWN_SETTINGS, *BLOCKS])
def test_settings(settings: dict[str, Any], error: type[Exception], words: str, world: World) -> None:
    check(world, lambda w: FusedSMoALinear.from_linear(w.linear, **settings), error, words)
    if not settings.keys() & {"use_lora_rate", "partition"}:
        check(world, lambda _: FusedSMoALinear(40, 33, **settings), error, words)


def test_from_linear_with_a_weight_that_has_no_spectrum(world: World) -> None:
    with torch.no_grad():
        world.linear.weight[3, 4] = float("nan")
    check(world, lambda w: FusedSMoALinear.from_linear(w.linear), ValueError, "weight must be finite")


STATE: list[tuple[Callable[[dict[str, Any]], object], type[Exception], str]] = [
    (lambda s: s.pop("smoa.ranks"), ValueError, r"lacks smoa\.ranks"),
    (lambda s: s["smoa.row_block"].add_(3), ValueError, r"row_block must lie in \[0, 3\)"),
    (lambda s: s.update({"smoa.ranks": one(9, 0, 0).int()}), ValueError, "ranks must sum to r=7"),
    (lambda s: s.update({"smoa.ranks": s["smoa.ranks"] + 0.5}), TypeError, "ranks must be an integer tensor"),
    (lambda s: s.update({"smoa.A": torch.zeros(3, 41)}), ValueError, r"size mismatch for .*smoa\.A"),
    (
        lambda s: [s.pop(key) for key in list(s) if key.startswith("smoa.")] and s["weight"].fill_(torch.nan),
        ValueError,
        "weight must be finite to have a spectrum",
    ),
    (lambda s: s.update(weight=None), TypeError, "weight must be a tensor, got NoneType"),
    (
        lambda s: s.update({"smoa.B": s["smoa.B"].to("meta")}),
        ValueError,
        r"smoa\.B must hold numbers, got a meta",
    ),
    (lambda s: s.pop("bias"), ValueError, "the state dict lacks bias; strict=False loads the others"),
    (lambda s: s.update(extra=one(1)), ValueError, "the state dict must not hold extra"),
]


@rows("edit", STATE)
def test_state_dict(
    edit: Callable[[dict[str, Any]], object], error: type[Exception], words: str, world: World
) -> None:
    other = FusedSMoALinear(40, 33, r=7, num_blocks=3)
    state = {name: value.clone() for name, value in other.state_dict().items()}
    edit(state)
    check(world, lambda w: w.layer.load_state_dict(state), error, words)


def without_weight(linear: nn.Linear) -> None:
    del linear.weight


LINEARS: list[tuple[Callable[[nn.Linear], object], type[Exception], str]] = [
    (without_weight, TypeError, "linear must hold its weight as an initialised parameter"),
    (nn.utils.parametrizations.weight_norm, TypeError, "linear must"),
    (
        lambda linear: setattr(linear, "weight", nn.Parameter(torch.ones(3))),
        ValueError,
        "weight must be a matrix",
    ),
    (
        lambda linear: setattr(linear, "bias", nn.Parameter(torch.ones(3))),
        ValueError,
        r"bias must have shape \(33,\)",
    ),
    (lambda linear: linear.to(torch.float8_e4m3fn), TypeError, "weight must be of 16 bits"),
]


@rows("spoil", LINEARS)
def test_layers_to_adapt(
    spoil: Callable[[nn.Linear], object], error: type[Exception], words: str, world: World
) -> None:
    linear = nn.Linear(40, 33)
    spoil(linear)
    before = {name: (id(p), p.requires_grad) for name, p in linear.named_parameters()}
    check(world, lambda _: FusedSMoALinear.from_linear(linear), error, words)
    assert before == {name: (id(p), p.requires_grad) for name, p in linear.named_parameters()}


MERGED: list[tuple[Callable[[FusedSMoALinear], object], type[Exception], str]] = [
    (lambda layer: layer.reset_parameters(), RuntimeError, r"call unmerge\(\) before reset_parameters"),
    (lambda layer: layer.reset_adapter(), RuntimeError, r"is merged: call unmerge\(\) before reset_adapter"),
    (lambda layer: setattr(layer, "alpha", 2), RuntimeError, r"call unmerge\(\) before assigning"),
    (lambda layer: setattr(layer, "scaling", 2), RuntimeError, r"call unmerge\(\) before assigning"),
    (lambda layer: layer.load_state_dict(layer.state_dict()), RuntimeError, r"is merged: call unmerge\(\)"),
    (lambda layer: layer(torch.ones(2, 40).half()), TypeError, "weight must have x's dtype torch.float16"),
    (lambda layer: layer(torch.ones(2, 40, device="meta")), ValueError, "weight must be on x's device meta"),
]


@rows("call", MERGED)
def test_merged_layers(
    call: Callable[[FusedSMoALinear], object], error: type[Exception], words: str, world: World
) -> None:
    world.layer.smoa.B.data.normal_()
    base = world.layer.weight.clone()
    world.layer.merge()
    check(world, lambda w: call(w.layer), error, words)
    merged = world.layer.weight.clone()
    with pytest.warns(UserWarning, match="already merged"):
        world.layer.merge()
    assert torch.equal(world.layer.weight, merged)
    world.layer.unmerge()
    assert torch.equal(world.layer.weight, base)
    with pytest.warns(UserWarning, match="not merged"):
        world.layer.unmerge()


ON_META: list[tuple[Callable[[FusedSMoALinear], object], str]] = [
    (lambda layer: layer.merge(), "the layer is on the meta device"),
    (lambda layer: layer.delta_weight(), "the layer is on the meta device"),
    (lambda layer: setattr(layer, "scaling", 2.0), "the layer is on the meta device"),
    (lambda layer: layer(torch.ones(2, 40)), "the layer has no blocks yet"),
    (lambda layer: layer.to_empty(device="cpu")(torch.ones(2, 40)), "the layer has no blocks yet"),
    (
        lambda layer: layer.load_state_dict(FusedSMoALinear(40, 33).state_dict()),
        "meta device: load with assign=True",
    ),
]


@pytest.mark.parametrize(("call", "words"), ON_META, ids=range(len(ON_META)))
def test_layers_without_values(call: Callable[[FusedSMoALinear], object], words: str) -> None:
    layer = FusedSMoALinear(40, 33, device="meta")
    with pytest.raises(RuntimeError, match=words):
        call(layer)
    layer = FusedSMoALinear(40, 33, alpha=3.0, device="meta")
    assert layer.scaling == 3.0 / 8
    layer.load_state_dict(FusedSMoALinear(40, 33, alpha=5.0).state_dict(), assign=True)
    assert layer.scaling == 5.0 / 8
    assert layer(torch.ones(2, 40)).shape == (2, 33)
