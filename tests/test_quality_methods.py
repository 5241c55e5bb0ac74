"""The quality study: the parameters and the budget of each method."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from quality_cases import SPLITS, TINY, tiny

from benchmarks.quality.methods import AT_LORAS, METHODS, MODULES, shuffled
from benchmarks.quality.study import train_and_judge
from smoa_kernels import BlockPartition
from smoa_kernels.peft import SMoALayer

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("blocks", [2, 3, 8])
def test_random_blocks_keep_their_sizes(blocks: int) -> None:
    spectral = BlockPartition.from_weight(torch.randn(37, 20), blocks)
    random = shuffled(spectral, torch.Generator().manual_seed(1))
    assert random != spectral
    assert Counter(random.row_block.tolist()) == Counter(spectral.row_block.tolist())
    assert Counter(random.col_block.tolist()) == Counter(spectral.col_block.tolist())
    assert random == shuffled(spectral, torch.Generator().manual_seed(1))
    assert random != shuffled(spectral, torch.Generator().manual_seed(2))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_each_method_trains_its_own_parameters_only(method: Any) -> None:
    cut = tiny(["blue", "green", "white"], 2)
    before = {name: value.clone() for name, value in cut.upper.state_dict().items()}
    result = train_and_judge(cut, method, TINY, 5e-2, 0, SPLITS.train, SPLITS.test)
    after = cut.upper.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    sizes = 2 * (16 + 24)
    assert result["parameters"] == sizes * method.r // method.num_blocks
    assert result["steps_done"] == 4
    assert result["loss_end"] < 1.2
    assert (result["rank"] > 0) == (method.kind != "none")
    assert result == train_and_judge(cut, method, TINY, 5e-2, 0, SPLITS.train, SPLITS.test) | {
        name: result[name] for name in ("seconds", "step_seconds")
    }


def test_a_scale_follows_the_size_of_the_weight() -> None:
    cut = tiny(["a", "b"], 2)
    model = replace(AT_LORAS[0], kappa=5.0).adapt(cut.fresh(0), cut.targets, 0)
    layers = [layer for layer in model.modules() if isinstance(layer, SMoALayer)]
    assert layers
    for layer in layers:
        rms = float(layer.base_weight().square().mean().sqrt())
        assert layer.scaling["default"] == pytest.approx(5 / rms, rel=1e-5)


@pytest.mark.parametrize("method", MODULES, ids=lambda method: method.name)
def test_modules_are_adapted_at_the_budget_that_is_said(method: Any) -> None:
    cut = tiny(["a", "b"], 2)
    base = cut.fresh(0)
    sized = method.sized(base, cut.targets)
    model = sized.adapt(base, cut.targets, 0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    wanted = "second" if method.modules == "MLP" else "first"
    assert trained
    assert all(f".{wanted}." in name for name in trained)
    # Both layers are 16 by 24 or 24 by 16, so training one of them halves the parameters at the same rank.
    assert sized.r == (16 if method.as_large else 8)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == (
        sized.r * 40 // method.num_blocks
    )
