"""The benchmarks' foundations: ratios of pairs, order of turns, gates, exact memory, slopes."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.gate import RedGateError, check_layers
from benchmarks.memory import allocated, footprint
from benchmarks.models import adapter_configs
from benchmarks.protocol import DEVICE, Comparison, Quartiles, Turns
from benchmarks.providers import (
    CONTIGUOUS,
    FROZEN,
    HIRA,
    LORA,
    SMOA,
    Case,
    few_token_algorithms,
    frozen,
    layer_providers,
    lora,
    smoa,
)
from benchmarks.test_layer import training_pass
from benchmarks.test_model_step import adapted, check_gradients
from benchmarks.test_setup import centroids, check
from smoa_kernels import BlockPartition

pytestmark = pytest.mark.slow

NAP = 0.5  # seconds; everything else here is short beside it, even on a busy machine
CASE = Case(24, 96, 80, 4, 16)
BF16 = torch.bfloat16


def test_a_ratio_is_taken_within_its_round() -> None:
    # The machine slows down fivefold: the ratio of medians would be 2·4/2 = 4, but each round's is 2.
    drifting = Comparison(
        "base", {"base": [1.0, 2.0, 5.0], "ours": [2.0, 4.0, 10.0], "lora": [1.0, 4.0, 5.0]}
    )
    assert drifting.ratio("ours") == Quartiles(2.0, 2.0, 2.0)
    assert drifting.ratio("ours", "lora").median == 2.0
    assert drifting.added("ours").median == 2.0
    assert drifting.spread == pytest.approx((3.5 - 1.5) / 2.0)
    assert drifting.doubt == "noisy"
    # The quartiles of [1, 1, 1, h, h] are 1 and h; the median is 1.
    for high, doubt in ((1.14, ""), (1.16, "noisy")):
        assert Comparison("base", {"base": [1.0, 1.0, 1.0, high, high]}).doubt == doubt


def test_providers_take_turns_in_an_order_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.protocol.SHORT", 0.0)
    calls: list[str] = []

    def run(name: str) -> dict[str, float]:
        calls.append(name)
        return {"forward": float(len(calls))}

    turns = Turns({name: lambda name=name: run(name) for name in "abc"}, "a")
    turns.warm_up(2)
    assert calls == list("abcabc")
    calls.clear()
    for _ in range(20):
        turns.round()
    rounds = ["".join(calls[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    # Each provider runs first in some round and directly after each other one in some round.
    assert {each[0] for each in rounds} == set("abc")
    pairs = {pair for each in rounds for pair in (each[:2], each[1:])}
    assert pairs == {a + b for a in "abc" for b in "abc" if a != b}
    found = turns.comparisons()["forward"].seconds
    assert found["b"] == [3 * i + each.index("b") + 1 for i, each in enumerate(rounds)]


def test_what_is_short_has_several_turns_in_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.protocol.SHORT", 2 * NAP)
    calls: list[str] = []

    def run(name: str) -> dict[str, float]:
        time.sleep(NAP if name == "long" else 0)
        calls.append(name)
        return {"forward": float(len(calls))}

    turns = Turns({name: lambda name=name: run(name) for name in ("short", "long")}, "short")
    assert NAP <= turns.warm_up(1) < 2 * NAP
    calls.clear()
    turns.round()
    assert sorted(calls) == ["long", *["short"] * 10]
    at = calls.index("long") + 1
    assert turns.comparisons()["forward"].seconds == {"short": [(66 - at) / 10], "long": [at]}
    assert 1 < at < 11


def test_a_backward_is_timed_without_its_forward() -> None:
    class SlowForward(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(NAP)
            return super().forward(x)

    found = training_pass(SlowForward(80, 96, device=DEVICE).requires_grad_(False), CASE)()
    assert found["forward"] >= NAP > found["backward"]
    assert found["both"] == found["forward"] + found["backward"]


@pytest.mark.parametrize(
    "case",
    [CASE, replace(CASE, dtype=BF16), replace(CASE, dropout=0.05), replace(CASE, num_blocks=1)],
    ids=str,
)
def test_every_provider_passes_its_gate(case: Case) -> None:
    algorithms = ("auto", "split") if case.dropout else few_token_algorithms()
    check_layers(case, {name: build(case) for name, build in layer_providers(case, algorithms).items()})


@pytest.mark.parametrize(
    "build",
    [frozen, lora, smoa(), smoa(block_order="contiguous")],
    ids=[FROZEN, LORA, SMOA, CONTIGUOUS],
)
def test_a_wrong_output_turns_the_gate_red(build: object, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build(CASE)  # type: ignore[operator]
    right = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x: right(x) * 1.001)
    with pytest.raises(RedGateError, match=r"T=24 96x80 .*: y of wrong errs by"):
        check_layers(CASE, {"wrong": layer})


def test_a_wrong_gradient_turns_the_gate_red(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = smoa()(CASE)
    layer.smoa_B.register_hook(lambda gradient: gradient * 1.001)
    with pytest.raises(RedGateError, match="dB of wrong"):
        check_layers(CASE, {"wrong": layer})


def test_another_mask_turns_the_gate_red() -> None:
    case = replace(CASE, dropout=0.05)
    layer = smoa(backend="eager")(replace(case, dropout=0.5))
    with pytest.raises(RedGateError, match="y of wrong"):
        check_layers(case, {"wrong": layer})


@pytest.mark.parametrize(("provider", "factor_name"), [(SMOA, "smoa_B"), (LORA, "lora_B"), (HIRA, "hira_B")])
def test_a_models_wrong_gradient_turns_the_gate_red(provider: str, factor_name: str) -> None:
    models = {name: adapted(config, smoke=True) for name, config in adapter_configs(2).items()}
    tokens = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    check_gradients(models, tokens)
    factor = next(p for n, p in models[provider].named_parameters() if factor_name in n)
    factor.register_hook(lambda gradient: gradient * 1.01 if gradient.dtype == torch.float32 else gradient)
    with pytest.raises(RedGateError, match=f"gradients of {provider} err by"):
        check_gradients(models, tokens)


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_what_stands_in_the_wrong_block_turns_the_partitions_gate_red(side: str) -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    partition = BlockPartition.from_weight(weight, 4)
    exact = torch.linalg.svd(weight.double(), full_matrices=False)
    check(partition, *exact)
    labels = {"rows": partition.row_block.clone(), "columns": partition.col_block.clone()}
    score = centroids(exact.U if side == "rows" else exact.Vh.T, exact.S)
    ends = torch.stack([score.argmin(), score.argmax()])
    labels[side][ends] = labels[side][ends.flip(0)]
    with pytest.raises(RedGateError, match=f"2 {side} are in another block"):
        check(BlockPartition.from_labels(labels["rows"], labels["columns"], 4), *exact)


def test_allocations_are_counted_to_the_byte() -> None:
    kept = []

    def allocate() -> None:
        kept.append(torch.empty(3 << 20, dtype=torch.uint8, device=DEVICE))
        torch.empty(2 << 20, dtype=torch.uint8, device=DEVICE)
        kept.append(torch.empty(1 << 20, dtype=torch.uint8, device=DEVICE))

    assert allocated(allocate) == (5 << 20, 4 << 20)
    assert allocated(lambda: None) == (0, 0)
    kept_bytes = sum(t.nbytes for t in kept)
    assert allocated(kept.clear) == (0, -kept_bytes)


def test_footprint_of_a_frozen_layer_is_y_and_dx() -> None:
    found = footprint(frozen(CASE), CASE)
    y, dx = 4 * 24 * 96, 4 * 24 * 80
    assert (found.saved, found.peak) == (0, y + dx)
    assert (found.forward_workspace, found.backward_workspace) == (0, 0)
