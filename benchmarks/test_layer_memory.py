"""Bytes that a layer saves for backward, counted by autograd's own hooks."""

from __future__ import annotations

import pytest
import torch
from providers import Case, frozen, hira, lora, smoa
from torch import Tensor, nn

CASES = [
    Case(2048, 2048, 2048, 4, 16),
    Case(2048, 2048, 2048, 4, 16, torch.bfloat16),
    Case(2048, 2048, 2048, 4, 16, dropout=0.05),
]


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct tensors that one forward saves, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # alive until counted, or its address could be given out again
        return tensor

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(storages.values())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_saved_for_backward(case: Case, smoke: bool, benchmark) -> None:
    if smoke:
        case = case.smoke()
    providers = {"frozen": frozen, "PEFT LoRA": lora, "PEFT HiRA": hira, "smoa": smoa()}
    saved = {name: saved_bytes(provider(case), case.input()) for name, provider in providers.items()}
    x_bytes = case.input().nbytes
    # x, and at most the seed beside it.
    assert x_bytes <= saved["smoa"] <= x_bytes + 8
    assert saved["smoa"] <= saved["PEFT LoRA"]
    layer, x = providers["smoa"](case), case.input()
    benchmark.pedantic(lambda: layer(x), rounds=1)
    benchmark.extra_info.update(title=f"saved for backward: {case}", saved_bytes=saved)
