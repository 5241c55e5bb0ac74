"""How forward and backward grow with T, N·C, r and K."""

from __future__ import annotations

from dataclasses import replace

import pytest

from .conftest import Measure
from .gate import check_layers
from .protocol import DEVICE, Run
from .providers import FROZEN, LORA, SMOA, Case, frozen, lora, smoa
from .test_layer_throughput import training_pass

POINT = Case(1024, 1024, 1024, 4, 16)
GPU_SCALE = 4  # a GPU of today is asleep at the CPU's sizes


def cases(axis: str) -> dict[int, Case]:
    """A case for each value on an axis."""
    scale = GPU_SCALE if DEVICE.type == "cuda" else 1
    at = replace(POINT, tokens=POINT.tokens * scale, out_features=1024 * scale, in_features=1024 * scale)
    if axis == "tokens":
        return {scale * n: replace(at, tokens=scale * n) for n in (256, 512, 1024, 2048, 4096)}
    if axis == "weight elements":
        sides = [scale * n for n in (512, 768, 1024, 1536, 2048)]
        return {n * n: replace(at, out_features=n, in_features=n) for n in sides}
    if axis == "rank":
        return {r: replace(at, rank=r) for r in (4, 8, 16, 32, 64, 128)}
    return {k: replace(at, num_blocks=k, rank=32) for k in (1, 2, 4, 8, 16, 32)}


def only_both(run: Run) -> Run:
    """The same without the phases of its own."""
    return lambda: {"both": run()["both"]}


@pytest.mark.parametrize("axis", ["tokens", "weight elements", "rank", "blocks"])
def test_scaling(axis: str, smoke: bool, measure: Measure) -> None:
    runs = {}
    for value, case in cases(axis).items():
        used = case.smoke() if smoke else case
        layers = {FROZEN: frozen(used), LORA: lora(used), SMOA: smoa()(used)}
        check_layers(used, layers)
        for name, layer in layers.items():
            runs[f"{name} @ {value}"] = only_both(training_pass(layer, used))
    measure(
        "scaling",
        f"scaling with {axis}: otherwise {POINT}",
        {"axis": axis, "values": list(cases(axis))},
        runs,
        baseline=next(iter(runs)),
        budget=8,
    )
