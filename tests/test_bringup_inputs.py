"""The bring-up's comparison: every pass finds inputs that no cache holds, and their copies weigh nothing."""

from __future__ import annotations

import gc
from itertools import islice

import pytest
import torch
from torch import Tensor, nn

from benchmarks.bringup import stages
from benchmarks.memory import Footprint, footprint
from benchmarks.protocol import DEVICE
from benchmarks.providers import FROZEN, LORA, Case
from benchmarks.rotation import rotated

pytestmark = pytest.mark.slow

CASE = Case(9, 48, 40, 2, 4)
PAIR = 4 * 9 * (48 + 40)  # bytes of x and dY
CACHES = (0, 3 * PAIR - 1, 3 * PAIR, 1_000_000)


@pytest.mark.parametrize("cache", CACHES)
def test_the_copies_pass_the_cache_and_take_little_more(cache: int) -> None:
    inputs = rotated(CASE, cache)
    found = list(islice(inputs, cache // PAIR + 2))
    assert next(inputs) == found[0]
    assert len({t.untyped_storage().data_ptr() for pair in found for t in pair}) == 2 * len(found) >= 4
    assert cache < (len(found) - 1) * PAIR <= cache + PAIR
    for x, dy in found:
        assert x.requires_grad
        assert torch.equal(x, CASE.input())
        assert torch.equal(dy, CASE.output_gradient())


class Watched(nn.Linear):
    """A frozen layer that notes where each of its passes found x and dY."""

    def __init__(self, seen: list[tuple[int, int]]) -> None:
        super().__init__(CASE.in_features, CASE.out_features, bias=False, device=DEVICE)
        self.requires_grad_(False)
        self.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        y.register_hook(lambda dy: self.seen.append((x.data_ptr(), dy.data_ptr())))
        return y


@pytest.mark.parametrize("cache", CACHES)
def test_more_than_the_cache_holds_is_read_before_a_copys_next_turn(
    cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whatever provider: they share the copies."""
    monkeypatch.setattr(stages, "cache_bytes", lambda: cache)
    seen: list[tuple[int, int]] = []
    stages._timed(CASE, {name: Watched(seen) for name in (FROZEN, LORA)}, smoke=False)
    assert len(seen) > 10
    assert len({x for x, _ in seen}) == len({dy for _, dy in seen}) == len(set(seen))
    for turn, place in enumerate(seen):
        earlier = [t for t in range(turn) if seen[t] == place]
        if earlier:
            assert len(set(seen[earlier[-1] + 1 : turn])) * PAIR > cache


def test_what_is_weighed_does_not_count_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are they there meanwhile, or a case that just fits into memory would not."""

    def inputs_alive() -> int:
        gc.collect()
        # Other tests leave tensors too, nested ones among them, which have no shape.
        found = (t for t in gc.get_objects() if type(t) is Tensor and not t.is_nested)
        return sum(t.shape in ((9, 48), (9, 40)) for t in found)

    alive: list[int] = []

    def weighed(layer: nn.Module, case: Case) -> Footprint:
        alive.append(inputs_alive())
        return footprint(layer, case)

    before = inputs_alive()
    monkeypatch.setattr(stages, "footprint", weighed)
    found = []
    for cache in (0, 1_000_000):
        monkeypatch.setattr(stages, "cache_bytes", lambda cache=cache: cache)
        (_, memory), red = stages._compare_one(CASE, smoke=True)
        assert not red
        found.append(memory.bytes)
    layers, _ = stages._gated(CASE)
    assert found == [{name: footprint(layer, CASE).record() for name, layer in layers.items()}] * 2
    assert alive == [before] * 2 * len(layers)
