"""The quality study: what each method trains, and at which budget."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from quality_cases import SPLITS, TINY, tiny

from benchmarks.quality.methods import (
    BY_NAME,
    METHODS,
    MODULES,
    SWEEPS,
    shuffled,
)
from benchmarks.quality.study import train_and_judge
from smoa_kernels import BlockPartition
from smoa_kernels.definition.spectral_order import order_source, spectral_orders

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
    # Both layers are 16 by 24 or 24 by 16: one of them has half of the parameters at the same rank.
    assert sized.r == (16 if method.as_large else 8)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == (
        sized.r * 40 // method.num_blocks
    )


def test_a_random_partition_changes_the_update_not_the_budget() -> None:
    cut = tiny(["a", "b"], 2)
    models = [BY_NAME[name].adapt(cut.fresh(0), cut.targets, 3) for name in ("SMoA K=2", "random K=2")]
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in models]
    assert counts[0] == counts[1]
    labels = [m.get_submodule("base_model.model.body.first").partition("default") for m in models]
    assert labels[0] != labels[1]


@pytest.mark.parametrize(
    ("name", "granule", "spectra"),
    [
        ("contiguous K=2", None, 0),
        ("contiguous K=4, r=32", None, 0),
        ("granule 8 K=2", 8, 2),
        ("SMoA K=2", 1, 2),
    ],
)
def test_other_orders_have_their_labels_and_only_the_spectral_one_computes_spectra(
    name: str, granule: int | None, spectra: int
) -> None:
    cut = tiny(["a", "b"], 2)
    base = cut.fresh(3)
    method, computed = BY_NAME[name], []

    def orders(weight: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        computed.append(size)
        return spectral_orders(weight, size)

    token = order_source.set(orders)
    try:
        model = method.adapt(base, cut.targets, 3)
    finally:
        order_source.reset(token)
    assert computed == [granule] * spectra
    for layer in ("first", "second"):
        adapter: Any = model.get_submodule(f"base_model.model.body.{layer}")
        partition, weight = adapter.partition("default"), adapter.base_layer.weight
        if granule is None:
            assert partition.is_contiguous
            assert partition == BlockPartition.contiguous(weight.shape, method.num_blocks)
        else:
            assert partition == BlockPartition.from_weight(weight, method.num_blocks, granule=granule)
            assert not partition.granularity % granule


def test_the_sweeps_at_loras_size_hold_every_order() -> None:
    larger = {method.name for method in SWEEPS["larger"]}
    assert larger >= {"SMoA K=4, r=32", "random K=4, r=32", "contiguous K=4, r=32"}
    assert {method.name for method in SWEEPS["methods"]} >= {"contiguous K=2", "granule 8 K=2"}
