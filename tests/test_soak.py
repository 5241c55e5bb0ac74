"""A long training in bfloat16: after it, loss and weights are as near to float64's as the reference's in bfloat16 are.

    SMOA_SOAK_STEPS=40000 pytest tests/test_soak.py     # else 2,000; a twentieth of them in the interpreter

A small error of each step that has a direction would add up here, and an update that is rounded away would be missing:
nothing that one step's error budget could show.
"""

import os

import pytest
import torch
from problems import DEVICE, make_problem
from torch import Tensor

from smoa_kernels import smoa_linear
from smoa_kernels.backends import triton_obstacle
from smoa_kernels.reference import reference_linear

pytestmark = pytest.mark.numerical

STEPS = int(os.environ.get("SMOA_SOAK_STEPS", "2000"))
# The interpreter takes a fifth of a second for a step of so small a layer.
SHARE = {"eager": 1.0, "triton": 0.05 if DEVICE.type == "cpu" else 1.0}


def train(function: object, steps: int, dtype: torch.dtype, **options: object) -> tuple[Tensor, Tensor]:
    """ΔW and the mean loss of the last tenth; masters in float32, as an optimiser over bfloat16 keeps them."""
    p = make_problem(tokens=64, out_features=10, in_features=12, ranks=(2, 1), seed=5, fill_padding=False)
    target = make_problem(
        tokens=64, out_features=10, in_features=12, ranks=(2, 1), seed=6, fill_padding=False
    )
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factors = [p.A.to(wide).requires_grad_(), torch.zeros_like(p.B, dtype=wide).requires_grad_()]
    weight = p.weight.to(torch.bfloat16).to(dtype)
    frozen = {"partition": p.partition, "ranks": p.ranks, "scaling": 1.0}
    wanted = weight.double() * (
        1 + 0.3 * (target.B @ target.A) * (p.partition.row_block[:, None] == p.partition.col_block)
    )
    optimizer = torch.optim.Adam(factors, 3e-3)
    late = []
    for step in range(steps):
        x = torch.randn(16, 12, generator=generator, dtype=torch.float64, device="cpu")
        x = x.to(DEVICE, torch.bfloat16)
        y = function(x.to(dtype), weight, None, *factors, **frozen, **options)  # type: ignore[operator]
        loss = (y.to(wide) - (x.double() @ wanted.T).to(wide)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= 0.9 * steps - 1:
            late.append(loss.detach().double())
    A, B = (factor.detach().double() for factor in factors)
    return B @ A, torch.stack(late).mean()


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_training_drifts_no_further_than_the_reference(backend: str) -> None:
    obstacle = triton_obstacle(DEVICE, torch.bfloat16)
    if backend == "triton" and obstacle is not None:
        pytest.skip(obstacle)
    steps = round(STEPS * SHARE[backend])
    truth = train(reference_linear, steps, torch.float64)
    same = train(reference_linear, steps, torch.bfloat16)
    ours = train(smoa_linear, steps, torch.bfloat16, backend=backend)
    start = train(reference_linear, max(steps // 100, 1), torch.float64)
    assert truth[1] < 0.7 * start[1]  # it has learnt
    for name, value, theirs, exact in zip(("weights", "loss"), ours, same, truth, strict=True):
        drift, allowed = ((v - exact).norm() / exact.norm() for v in (value, theirs))
        assert drift <= 2 * allowed + 1e-3, (name, float(drift), float(allowed))
