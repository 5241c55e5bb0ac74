"""The redrawn dropout mask depends on (seed, token, global column) only."""

import pytest
import torch

from smoa_kernels.definition import dropout
from smoa_kernels.definition.dropout import Dropout, hashed_words


@pytest.fixture(autouse=True, params=["generator", "hash"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's generator, and the GPU's hash, which gives the same integers on any device."""
    if request.param == "hash":
        monkeypatch.setattr(dropout, "draws", lambda device: False)


pytestmark = pytest.mark.numerical


def multiplier(
    p: float = 0.3, tokens: int = 64, columns: int = 101, seed: int = 5, **kwargs: int
) -> torch.Tensor:
    return Dropout(torch.tensor(seed), p, **kwargs).multiplier(
        torch.empty(tokens, columns, dtype=torch.float64)
    )


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_rate_and_scale(p: float) -> None:
    mask = multiplier(p, 1000, 1000)
    dropped = (mask == 0).double().mean()
    assert abs(float(dropped) - p) < 5 * (p * (1 - p) / 1e6) ** 0.5 + 2**-16
    kept = mask[mask != 0]
    assert (kept == kept[0]).all()
    assert float(kept[0]) == pytest.approx(1 / (1 - p), rel=2e-4)
    assert float(kept[0]) * (1 - round(p * 2**16) / 2**16) == pytest.approx(1, rel=1e-12)


def test_every_column_and_every_16_bit_lane_is_random() -> None:
    """An int64 from the default range has a constant sign bit, which would bias every fourth column."""
    kept = (multiplier(0.5, 4000, 64) != 0).double().mean(0)
    assert float((kept - 0.5).abs().max()) < 0.04


def test_fewer_tokens_are_a_prefix() -> None:
    assert torch.equal(multiplier(tokens=10), multiplier()[:10])


def test_the_largest_probability_still_keeps_something() -> None:
    assert Dropout(torch.tensor(1), 0.9999999).scale == 2**16


def test_the_hash_is_splitmix64() -> None:
    """The published sequence for this seed. Drawing it in several parts gives the same numbers."""
    words = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    seed = torch.tensor([1234567])
    at_once, one_by_one = hashed_words(seed, 2), hashed_words(seed, 2)
    assert [w % 2**64 for w in at_once(2).flatten().tolist()] == words
    assert [w % 2**64 for _ in range(2) for w in one_by_one(1).flatten().tolist()] == words


def test_tokens_columns_and_seeds_are_independent() -> None:
    """Masks of neighbouring seeds are independent too: one is not a shifted copy of the other."""
    masks = [multiplier(0.5, 200, 400, seed) != 0 for seed in (7, 8)]
    for first, second in (
        (masks[0][1:], masks[0][:-1]),
        (masks[0][:, 1:], masks[0][:, :-1]),
        (masks[0][:, 4:], masks[0][:, :-4]),
        (masks[0], masks[1]),
        (masks[0][:, 4:], masks[1][:, :-4]),
    ):
        agree = float((first == second).double().mean())
        assert abs(agree - 0.5) < 5 * 0.5 / first.numel() ** 0.5
