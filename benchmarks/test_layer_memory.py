"""Memory of one training pass of a layer: saved for backward, peak, and workspace."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .cases import MEMORY, skip_what_loops_multiply
from .gate import check_layers
from .memory import footprint
from .providers import LORA, SMOA, Case, layer_providers


@pytest.mark.parametrize("case", MEMORY, ids=str)
def test_footprint(case: Case, smoke: bool, benchmark: BenchmarkFixture) -> None:
    title, params = f"memory: {case}", case.record()
    skip_what_loops_multiply(case.multiplications, case.dtype, smoke)
    if smoke:
        case = case.smoke()
    algorithms = ("auto",) if case.dropout else ("auto", "split")
    layers = {name: build(case) for name, build in layer_providers(case, algorithms).items()}
    check_layers(case, layers)
    found = benchmark.pedantic(lambda: {name: footprint(layer, case) for name, layer in layers.items()})
    x_bytes = case.input().nbytes
    # x, and at most the seed beside it.
    assert x_bytes <= found[SMOA].saved <= x_bytes + 8
    assert found[SMOA].saved <= found[LORA].saved
    benchmark.extra_info.update(
        kind="memory",
        title=title,
        params=params,
        bytes={name: footprint.record() for name, footprint in found.items()},
    )
