"""The redrawn dropout mask depends on (seed, token, global column) only."""

import pytest
import torch

from smoa_kernels.definition.dropout import Dropout, _keys, _philox

pytestmark = pytest.mark.numerical


def multiplier(
    p: float = 0.3, tokens: int = 64, columns: int = 101, seed: int = 5, **kwargs: int
) -> torch.Tensor:
    x = torch.empty(tokens, columns, dtype=torch.float64)
    return Dropout(torch.tensor(seed), p, **kwargs).multiplier(x)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_rate_and_scale(p: float) -> None:
    mask = multiplier(p, 1000, 1000)
    dropped = (mask == 0).double().mean()
    assert abs(float(dropped) - p) < 5 * (p * (1 - p) / 1e6) ** 0.5 + 2**-16
    kept = mask[mask != 0]
    assert (kept == kept[0]).all()
    assert float(kept[0]) == pytest.approx(1 / (1 - p), rel=2e-4)
    assert float(kept[0]) * (1 - round(p * 2**16) / 2**16) == pytest.approx(1, rel=1e-12)


def test_every_column_and_token_is_random() -> None:
    kept = multiplier(0.5, 4000, 64) != 0
    for rates in (kept.double().mean(0), kept.view(500, 8, 64).double().mean((0, 2))):
        assert float((rates - 0.5).abs().max()) < 0.04


def test_fewer_tokens_are_a_prefix() -> None:
    assert torch.equal(multiplier(tokens=10), multiplier()[:10])


def test_the_largest_probability_still_keeps_something() -> None:
    assert Dropout(torch.tensor(1), 0.9999999).scale == 2**16


def test_it_is_philox() -> None:
    """The known answer for seven rounds, a counter and a key of zeros, published with Random123."""
    zero = torch.zeros(1, dtype=torch.int64)
    words = [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert [int(word) % 2**32 for word in _philox(_keys(zero[0]), zero, zero)] == words


@pytest.mark.parametrize("at_once", [1, 101, 300])
def test_parts_of_the_tokens_give_the_same_mask(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = multiplier(tokens=70)
    monkeypatch.setattr("smoa_kernels.definition.dropout._DRAWS_AT_ONCE", at_once)
    assert torch.equal(multiplier(tokens=70), expected)


def test_tokens_columns_and_seeds_are_independent() -> None:
    """Masks of neighbouring seeds are independent too: one is not a shifted copy of the other."""
    masks = [multiplier(0.5, 200, 400, seed) != 0 for seed in (7, 8)]
    for first, second in (
        *((masks[0][lag:], masks[0][:-lag]) for lag in range(1, 10)),  # tokens that share a draw, and others
        (masks[0][:, 1:], masks[0][:, :-1]),
        (masks[0][:, 4:], masks[0][:, :-4]),
        (masks[0], masks[1]),
        (masks[0][:, 4:], masks[1][:, :-4]),
    ):
        agree = float((first == second).double().mean())
        assert abs(agree - 0.5) < 5 * 0.5 / first.numel() ** 0.5
