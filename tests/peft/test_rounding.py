"""Stochastic rounding follows its definition element by element, is unbiased, and is reproducible."""

import zlib

import numpy as np
import pytest
import torch

from smoa_kernels.adapter_folder import rounding
from smoa_kernels.adapter_folder.rounding import round_stochastically

half_types = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def drawn(size, seed=3, scale=1.0):
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))


@half_types
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-6], ids=["normal", "subnormal"])
def test_definition(dtype, wide, scale, monkeypatch):
    """The docstring's formula in float64, with neighbours by `nextafter`; splitting into panels changes nothing."""
    monkeypatch.setattr(rounding, "_PANEL", 64)
    values = drawn(333, scale=scale).to(wide)
    words = np.random.PCG64([5, zlib.crc32(b"model.weight")]).random_raw(167)
    halves = [half for word in words.tolist() for half in (word & 0xFFFFFFFF, word >> 32)]
    expected = []
    for value, half in zip(values, halves, strict=False):
        near = value.to(dtype)
        zero, infinity = torch.zeros((), dtype=dtype), torch.tensor(torch.inf, dtype=dtype)
        a = torch.nextafter(near, zero) if near.abs().double() > value.abs() else near
        b = torch.nextafter(a, infinity.copysign(near))
        h = (value.double() - a.double()) / (b.double() - a.double())
        expected.append(b if (half >> 8) * 2.0**-24 < h else a)
    rounded = round_stochastically(values, dtype, seed=5, name="model.weight")
    assert torch.equal(rounded, torch.stack(expected))


@half_types
def test_exact_values_are_kept(dtype):
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, torch.finfo(dtype).max, torch.inf, -torch.inf])
    rounded = round_stochastically(values, dtype, seed=0, name="a")
    assert torch.equal(rounded.view(torch.int16), values.to(dtype).view(torch.int16))
    assert round_stochastically(torch.tensor([torch.nan]), dtype, seed=0, name="a").isnan().all()
    beyond = torch.tensor([3.4e38, 3.4e38]) if dtype == torch.bfloat16 else torch.tensor([1e6, 65521.0])
    assert torch.equal(round_stochastically(beyond, dtype, seed=0, name="a"), beyond.to(dtype))
    assert round_stochastically(torch.empty(0, 3), dtype, seed=0, name="a").shape == (0, 3)


def test_bits_depend_on_seed_and_name_alone():
    values = drawn(4096).view(64, 64)
    first, again, other_seed, other_name = (
        round_stochastically(values, torch.bfloat16, seed=seed, name=name)
        for seed, name in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other_seed)
    assert not torch.equal(first, other_name)
    # Elements are numbered in row-major order, whatever the strides.
    assert torch.equal(round_stochastically(values.T.contiguous().T, torch.bfloat16, seed=0, name="a"), first)
