"""The cost model of experts (benchmarks/experts_cost.py): hand counts, and the page that shows its figures."""

from __future__ import annotations

import pytest

from benchmarks.experts_cost import (
    EXPERTS_WAYS,
    MOE_MODELS,
    ExpertsProblem,
    estimate_experts,
    model_seconds,
)
from smoa_kernels.tuning.gpus import GPUS

H100 = GPUS["h100"]


def over_frozen(model: str, tokens: int, way: str, rank: int = 16) -> float:
    base = model_seconds(model, tokens, "frozen", H100, rank=rank)
    return model_seconds(model, tokens, way, H100, rank=rank) / base


def test_frozen_and_lora_by_hand() -> None:
    """Mixtral's gate and up at 2048 tokens, 512 pairs an expert, in µs: products at 700 TFLOP/s, memory at 2.9 TB/s."""
    p = ExpertsProblem(4096, 8, 28672, 4096, 4, 16)
    product = 2 * (4096 + 8 * 64) * 28672 * 4096 / 700e6 + 2.3
    assert estimate_experts(p, H100, "frozen").device_seconds() * 1e6 == pytest.approx(2 * product, rel=1e-3)
    weights = 8 * 28672 * 4096 * 2 / 2.9e6  # a pass over all experts' weights
    lora = 3 * product + (2 + 1 + 1) * weights + 3 * 2.3
    assert estimate_experts(p, H100, "lora").device_seconds() * 1e6 == pytest.approx(lora, rel=2e-3)


def test_few_pairs_cost_what_reading_the_weights_costs() -> None:
    """A token of Qwen3-30B-A3B meets 8 of 128 experts."""
    one = estimate_experts(ExpertsProblem(8, 128, 1536, 2048), H100, "frozen")
    assert one.device_seconds("forward") * 1e6 == pytest.approx(8 * 1536 * 2048 * 2 / 2.9e6 + 2.3, rel=0.01)


@pytest.mark.parametrize("tokens", [2048, 8192])
@pytest.mark.parametrize("model", MOE_MODELS)
def test_ranks_change_little(model: str, tokens: int) -> None:
    for way in EXPERTS_WAYS:
        assert over_frozen(model, tokens, way, rank=8) == pytest.approx(
            over_frozen(model, tokens, way), abs=0.05
        )


@pytest.mark.parametrize("tokens", [2048, 8192])
@pytest.mark.parametrize("model", MOE_MODELS)
def test_smoa_is_predicted_below_pefts_lora(model: str, tokens: int) -> None:
    assert over_frozen(model, tokens, "smoa") < over_frozen(model, tokens, "lora")
