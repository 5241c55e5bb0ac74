"""TF32 products round their operands to nearest; a tensor core alone would truncate them.

All values are positive and equal. Operands lie 0.75 of a step above a TF32 number. Truncation loses 0.75 of a step,
rounding gains 0.25, and two TF32 parts are exact. So a product of two such operands errs by 1.5 steps or by
half a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from expert_problems import make_problem as make_experts
from problems import NAMES, Case, make_problem, relative_error
from torch import Tensor

from smoa_kernels.definition.experts import reference_experts_linear

pytestmark = pytest.mark.smoke

STEP = 2**-10
"""The step from 1 to the next number in TF32 and in float16."""
FACTOR = 1 + 0.75 * STEP
# Exact in float16; with dY = 1, H holds their product, 1 + 2^-4 + 0.75 STEP.
X, WEIGHT = 1 + 3 * 2**-6, 1 + 2**-6


def alike(owner: object, **values: float) -> dict[str, Tensor]:
    """Tensors with the shapes of the problem's, each filled with one value."""
    return {name: torch.full_like(getattr(owner, name), value) for name, value in values.items()}


def of_layer(algorithm: str, factors: torch.dtype) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The results of a float16 layer, and the exact ones."""
    p = make_problem(tokens=64, out_features=64, in_features=64, ranks=(16,), bias=False)
    p = replace(p, scaling=1.0, **alike(p, x=X, weight=WEIGHT, A=FACTOR, B=FACTOR, dy=1.0))
    p, case = p.to(torch.float16, factors), Case("triton", algorithm, torch.float16)
    return p.run(**case.options), case.definition(p.to(torch.float64))


def of_experts(factors: torch.dtype) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The same for one expert."""
    p = make_experts(pairs=(64,), rows=64, cols=64, ranks=(16,), blocks="contiguous")
    adapter = replace(p.adapter, **alike(p.adapter, weight=WEIGHT, A=FACTOR, B=FACTOR, scaling=1.0))
    p = replace(p, adapter=adapter, **alike(p, x=X, dy=1.0)).to(torch.float16, factors)
    return p.operator("triton"), p.to(torch.float64).run(reference_experts_linear)


def steps(found: Sequence[Tensor], truth: Sequence[Tensor]) -> dict[str, float]:
    """Relative errors of y, dX, dA and dB, in steps."""
    return {
        name: relative_error(ours, exact) / STEP
        for name, ours, exact in zip(NAMES[:4], found, truth, strict=True)
    }


@pytest.mark.parametrize("algorithm", ["split", "merged", "fused"])
def test_float32_factors_of_a_layer(algorithm: str) -> None:
    """Over a half weight: dA and dB take the factors as two TF32 parts, and H rounded."""
    errors = steps(*of_layer(algorithm, torch.float32))
    assert max(errors["y"], errors["dX"]) < 1, errors
    assert max(errors["dA"], errors["dB"]) < 0.25, errors


def test_float32_factors_of_experts() -> None:
    errors = steps(*of_experts(torch.float32))
    assert max(errors.values()) < 1, errors


@pytest.mark.parametrize("who", ["layer", "experts"])
def test_half_factors(who: str) -> None:
    """Half factors are exact in TF32; H is not."""
    errors = steps(*(of_layer("split", torch.float16) if who == "layer" else of_experts(torch.float16)))
    assert max(errors.values()) < 0.5, errors
