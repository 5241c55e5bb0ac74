"""Unit tests of the helpers that all kernels share."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from smoa_kernels.kernels.common import to_tf32

pytestmark = pytest.mark.numerical


@triton.jit
def rounded_kernel(value_ptr, out_ptr, INPUT_PRECISION: tl.constexpr, BLOCK: tl.constexpr) -> None:
    slots = tl.arange(0, BLOCK)
    tl.store(out_ptr + slots, to_tf32(tl.load(value_ptr + slots), INPUT_PRECISION))


def rounded(value: torch.Tensor, precision: str = "tf32") -> torch.Tensor:
    out = torch.empty_like(value)
    rounded_kernel[(1,)](value, out, precision, value.numel())
    return out


def test_tf32_rounds_to_nearest() -> None:
    """To nearest, with 10 bits after the point; the expected value comes from frexp and round in float64."""
    value = torch.randn(1024) * 2.0 ** torch.randint(-100, 100, (1024,))
    mantissa, exponent = torch.frexp(value.double())
    nearest = torch.ldexp((mantissa * 2**11).round(), exponent - 11)
    assert torch.equal(rounded(value).double(), nearest)
    assert torch.equal(rounded(value, "ieee"), value)


def test_tf32_keeps_infinity_and_nan() -> None:
    """Infinity and NaN stay. Values that would round to infinity stay too; the tensor core truncates them."""
    largest = torch.finfo(torch.float32).max
    value = torch.tensor([float("inf"), -float("inf"), float("nan"), largest, -largest, 0.0, -0.0, 1e-45])
    # A GPU's own NaN, and a negative NaN. Its bits are not all one, because the emulator marks unwritten memory so.
    largest_nan = torch.tensor([0x7FFFFFFF, -2], dtype=torch.int32).view(torch.float32)
    value = torch.cat([value, largest_nan, torch.ones(6)])
    found = rounded(value).cpu()
    assert found[:2].tolist() == [float("inf"), -float("inf")]
    assert found[[2, 8, 9]].isnan().all()
    assert found[3:5].tolist() == [largest, -largest]
    assert found[5:8].tolist() == [0.0, 0.0, 0.0]
    assert found[10:].tolist() == [1.0] * 6
