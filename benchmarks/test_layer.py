"""One layer beside PEFT's LoRA and HiRA and the paper's way: a training pass, a few tokens, memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from smoa_kernels.backends.eager import choose_algorithm

from .cases import FEW_TOKENS, LAYERS, MEMORY, skip_what_loops_multiply
from .conftest import Measure
from .gate import check_layers
from .memory import footprint
from .protocol import DEVICE, Run, pass_seconds, timed
from .providers import (
    DEFAULT_HIRA,
    FROZEN,
    HIRA,
    LORA,
    PAPER,
    SMOA,
    Case,
    few_token_algorithms,
    layer_providers,
)


def training_pass(layer: nn.Module, case: Case) -> Run:
    """A training pass of a layer, always on the same x and dY."""
    return partial(pass_seconds, layer, [case.input()], case.output_gradient())


def checked(case: Case, algorithms: Sequence[str], without: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Every provider's layer, after its gate."""
    providers = layer_providers(case, algorithms)
    layers = {name: build(case) for name, build in providers.items() if name not in without}
    check_layers(case, layers)
    return layers


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_over_frozen(case: Case, smoke: bool, measure: Measure) -> None:
    title, params = f"layer: {case}", case.record()
    skip_what_loops_multiply(case.multiplications, case.dtype, smoke)
    case = case.smoke() if smoke else case
    # Under dropout none is merged.
    algorithms = ["auto", "split"] if case.dropout else ["auto", "merged", "split"]
    if DEVICE.type == "cpu":  # the algorithm of "auto" is not timed twice
        algorithms.remove(
            choose_algorithm(case.tokens, case.rank, case.dtype, tf32=False, dropout=bool(case.dropout))
        )
    runs = {name: training_pass(layer, case) for name, layer in checked(case, algorithms).items()}
    measure("layer", title, params, runs, baseline=FROZEN, budget=12, warmup=1)


@pytest.mark.parametrize("case", FEW_TOKENS, ids=str)
def test_few_tokens(case: Case, smoke: bool, measure: Measure) -> None:
    """Decode. Building anything of W0's size would dominate its time.

    It shows for how many tokens "auto" should take the expanded form (`backends/eager.py`, `backends/native`).
    """
    title, params = f"few tokens: {case}", case.record()
    case = case.smoke() if smoke else case
    # HiRA and the paper's way build a dense weight for every token; the layer's benchmark times them.
    layers = checked(case, few_token_algorithms(), without=(HIRA, DEFAULT_HIRA, PAPER))
    runs = {
        name: timed("forward", torch.no_grad()(partial(layer, case.input().detach())))
        for name, layer in layers.items()
    }
    measure("few tokens", title, params, runs, baseline=FROZEN, budget=2, warmup=5)


@pytest.mark.parametrize("case", MEMORY, ids=str)
def test_memory(case: Case, smoke: bool, benchmark: BenchmarkFixture) -> None:
    title, params = f"memory: {case}", case.record()
    skip_what_loops_multiply(case.multiplications, case.dtype, smoke)
    case = case.smoke() if smoke else case
    layers = checked(case, ("auto",) if case.dropout else ("auto", "split"))
    found = benchmark.pedantic(lambda: {name: footprint(layer, case) for name, layer in layers.items()})
    x_bytes = case.input().nbytes
    saved = found[SMOA]["saved"]
    assert x_bytes <= saved <= x_bytes + 8  # x, and at most the seed beside it
    assert saved <= found[LORA]["saved"]
    benchmark.extra_info.update(kind="memory", title=title, params=params, bytes=found)
