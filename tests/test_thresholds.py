"""Rounding by thresholds: exact where nothing changes, unbiased for every x, alike for a whole weight and its parts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from problems import HALF, Case, each, make_problem, relative_error, some
from torch import Tensor

from smoa_kernels.backends import load_backend
from smoa_kernels.definition.thresholds import ORIGIN, Place, round_weight

ROWS, COLS = 512, 1024


def all_halves(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)


@pytest.mark.parametrize("dtype", HALF)
def test_every_number_of_the_half_type_stays(dtype: torch.dtype) -> None:
    """Subnormal numbers, the largest, zeros of both signs, Inf and NaN."""
    W0 = all_halves(dtype)
    for place in (ORIGIN, Place(65535), ORIGIN.T):
        rounded = round_weight(W0.float(), dtype, place)
        number = ~W0.isnan()
        assert torch.equal(rounded.view(torch.int16)[number], W0.view(torch.int16)[number])
        assert rounded[~number].isnan().all()


@pytest.mark.parametrize("dtype", HALF)
def test_every_kind_of_nan_stays(dtype: torch.dtype) -> None:
    """All bits set, as a GPU makes it, or only the lowest ones."""
    bits = torch.tensor([-1, 0x7FFFFFFF, 0x7F800001, -0x7FFFFF]).to(torch.int32)
    assert round_weight(bits.view(torch.float32).expand(300, 4), dtype).isnan().all()


@pytest.mark.parametrize("dtype", HALF)
def test_the_result_is_one_of_the_two_neighbours(dtype: torch.dtype) -> None:
    W_eff = 1e-3 + torch.rand(ROWS, COLS)  # below 6e-5 float16's numbers lie further apart
    rounded = round_weight(W_eff, dtype).double()
    step = torch.finfo(dtype).eps * 2.0 ** W_eff.abs().double().log2().floor()
    assert ((rounded - W_eff).abs() < step).all()
    largest = torch.full((64, 64), torch.finfo(dtype).max)
    assert torch.equal(round_weight(largest, dtype).float(), largest)


def test_float32_and_float64_are_not_rounded() -> None:
    for dtype in (torch.float32, torch.float64):
        W_eff = torch.randn(5, 7, dtype=dtype)
        assert torch.equal(round_weight(W_eff, dtype), W_eff)


@pytest.mark.parametrize("dtype", HALF)
def test_a_part_rounds_like_the_whole(dtype: torch.dtype) -> None:
    """A shard, a panel of rows, a part of a part, a transposed weight, a weight stored by columns."""
    W_eff = torch.randn(97, 61)
    whole, part = round_weight(W_eff, dtype), ORIGIN.part(13, 20)
    assert torch.equal(round_weight(W_eff[13:, 20:], dtype, part), whole[13:, 20:])
    assert torch.equal(round_weight(W_eff[50:, 40:], dtype, part.part(37, 20)), whole[50:, 40:])
    assert torch.equal(round_weight(W_eff.T, dtype, ORIGIN.T), whole.T)
    assert torch.equal(round_weight(W_eff[13:, 20:].T, dtype, part.T), whole[13:, 20:].T)
    assert torch.equal(round_weight(W_eff.T.contiguous().T, dtype), whole)
    assert ORIGIN.part(2**20, 2**20).first < 2**16


# The columns' thresholds step by this share of all levels: a wave of the same frequency would find their pattern.
FREQUENCY = 30011 / 2**16
COLUMN = torch.arange(COLS, dtype=torch.float64)
ACTIVATIONS = {
    "constant": torch.ones(COLS),
    "alternating": (-1.0) ** COLUMN,
    "one-hot": torch.eye(COLS)[371],
    "sparse": (torch.arange(COLS) % 37 == 5) * 1.0,
    "half of it": (COLUMN < COLS // 2) * 1.0,
    "random": torch.randn(COLS, generator=torch.Generator().manual_seed(1)),
    "with a mean": 1 + 0.3 * torch.randn(COLS, generator=torch.Generator().manual_seed(2)),
    **{
        f"a wave of {f:.4f}": torch.cos(2 * math.pi * f * COLUMN)
        for f in (0.01, 0.1, 1 / 3, FREQUENCY, 2 * FREQUENCY)
    },
}


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("delta", [1e-3, 3e-2])
def test_no_activations_see_a_bias(delta: float, activations: str) -> None:
    """The error of x W_effᵀ has mean 0 over the rows, and is no larger than that of random thresholds."""
    generator = torch.Generator().manual_seed(0)
    W0 = (torch.randn(ROWS, COLS, generator=generator) / COLS**0.5).bfloat16().float()
    B, A = (torch.randn(*shape, generator=generator) for shape in ((ROWS, 8), (8, COLS)))
    W_eff = W0 * (1 + delta * B @ A)
    x = ACTIVATIONS[activations].double()

    def errors(rounded: Tensor) -> Tensor:
        return (rounded.double() - W_eff.double()) @ x

    drawn = torch.randint(0, 2**16, W0.shape, generator=generator, dtype=torch.int32)
    random = (W_eff.view(torch.int32) + drawn).bitwise_and_(-(2**16)).view(torch.float32)
    ours, at_random = errors(round_weight(W_eff, torch.bfloat16)), errors(random)
    spread = at_random.square().mean().sqrt()
    assert ours.square().mean().sqrt() < 1.25 * spread
    assert ours.mean().abs() < 4 * spread / ROWS**0.5


@pytest.mark.parametrize("num_blocks", [1, 4])
@pytest.mark.parametrize("delta", [3e-4, 1e-3, 1e-2])
def test_the_error_beside_split_and_the_order_of_peft(delta: float, num_blocks: int) -> None:
    """At most 1.75 times split's, and 1.45 times that of PEFT's order: a rounded update added to a rounded output.

    At 1e-3 PEFT's order loses half of the update, which is a small part of y.
    """
    p = make_problem(tokens=256, out_features=512, in_features=COLS, ranks=(8,) * num_blocks, bias=False)
    p = replace(p, x=p.x + 0.5, B=p.B * (delta / (p.scaling * (p.B @ p.A).square().mean().sqrt())))
    half = p.to(torch.bfloat16, torch.float32)
    exact = half.to(torch.float64).forward(backend="reference")
    peft = half.x @ half.weight.T + half.x @ half.delta_weight().T
    split, ours = (half.forward(algorithm=name, backend="eager") for name in ("split", "merged"))
    split, peft, ours = (relative_error(y, exact) for y in (split, peft, ours))
    assert ours < 1.75 * split
    assert ours < 1.45 * peft


def of_half(backend: str) -> list[Case]:
    found = some(backend, *HALF) if backend in ("eager", "native", "triton") else []
    return [case for case in found if case.algorithm in ("auto", "merged") and case.order == "spectral"]


@each(of_half)
def test_without_an_update_the_weight_is_the_base(case: Case) -> None:
    p = make_problem(tokens=3, out_features=40, in_features=72, ranks=(3, 2)).to(case.dtype, torch.float32)
    adapter = replace(p, B=torch.zeros_like(p.B)).adapter()
    assert torch.equal(load_backend(case.backend).modulated_weight(adapter), p.weight)
