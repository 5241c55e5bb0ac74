"""The two dead zones of half precision, and that ours has neither (docs/numerics.md).

An update of 1e-4 of the weights is far below bf16's last bit. Its output must arrive all the same.
"""

from collections.abc import Callable
from dataclasses import replace

import peft
import pytest
import torch
from problems import DEVICE, LinearProblem, make_problem
from torch import Tensor, nn

from smoa_kernels import smoa_linear
from smoa_kernels.backends import load_backend, resolve_backend

pytestmark = pytest.mark.numerical


def survival(problem: LinearProblem, base: LinearProblem, run: Callable[[LinearProblem], Tensor]) -> float:
    """Share of the adapter's output that survives: projection of `y - y_base` on the exact adapter output."""
    exact = problem.to(torch.float64)
    truth = exact.run_reference()[0] - base.to(torch.float64).run_reference()[0]
    difference = run(problem).double() - run(base).double()
    return float((difference * truth).sum() / truth.square().sum())


def small_update(
    dtype: torch.dtype, *, tokens: int, bias: bool, ranks: tuple[int, ...] = (4, 4), delta: float = 1e-4
) -> tuple[LinearProblem, LinearProblem]:
    """A problem whose update is `delta` of the weights in rms, and the same with B = 0."""
    problem = make_problem(
        tokens=tokens, out_features=256, in_features=256, ranks=ranks, bias=bias, fill_padding=False
    )
    product = (problem.B @ problem.A) * (problem.partition.row_block[:, None] == problem.partition.col_block)
    relative = problem.scaling * product.square().mean().sqrt()
    problem = replace(problem, B=problem.B * (delta / relative)).to(dtype, torch.float32)
    return problem, replace(problem, B=torch.zeros_like(problem.B))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [2048, 64])
def test_auto_delivers_the_whole_output(dtype: torch.dtype, bias: bool, tokens: int) -> None:
    problem, base = small_update(dtype, tokens=tokens, bias=bias)
    share = survival(problem, base, lambda p: p.run()[0])
    # The base's own rounding is noise on the measure; it falls with the number of outputs.
    assert share == pytest.approx(1.0, abs=0.05 if tokens == 2048 else 0.2)


def test_so_does_the_expanded_form() -> None:
    problem, base = small_update(torch.bfloat16, tokens=512, bias=True)
    assert survival(
        problem, base, lambda p: p.run(algorithm="expanded", backend="eager")[0]
    ) == pytest.approx(1.0, abs=0.08)


@pytest.mark.parametrize("bias", [True, False])
def test_a_rounded_weight_delivers_nothing(bias: bool) -> None:
    problem, base = small_update(torch.bfloat16, tokens=2048, bias=bias)
    assert abs(survival(problem, base, lambda p: p.run(algorithm="merged")[0])) < 0.05


@pytest.mark.parametrize("bias", [True, False])
def test_peft_layers_deliver_a_tenth(bias: bool) -> None:
    """PEFT's HiRA is K = 1: the same update, added to a base output that is already rounded."""
    problem, base = small_update(torch.bfloat16, tokens=2048, bias=bias, ranks=(8,))
    linear = nn.Linear(256, 256, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight.data = problem.weight
    if problem.bias is not None:
        linear.bias.data = problem.bias
    config = peft.HiraConfig(r=8, target_modules=["0"])
    layer = peft.inject_adapter_in_model(config, nn.Sequential(linear))[0]

    def run(p: LinearProblem) -> Tensor:
        layer.hira_A["default"].data = p.A.bfloat16()
        layer.hira_B["default"].data = p.scaling * p.B.bfloat16()
        return layer(p.x).detach()

    assert 0.0 < survival(problem, base, run) < 0.2
    assert survival(problem, base, lambda p: p.run()[0]) == pytest.approx(1.0, abs=0.05)


def test_autocast_multiplies_in_half_and_keeps_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    backend = load_backend(resolve_backend("auto", DEVICE, torch.bfloat16, 4))
    forward = backend.forward
    monkeypatch.setattr(backend, "forward", lambda *a: seen.append(a) or forward(*a))
    problem, base = small_update(torch.float32, tokens=2048, bias=True)
    bf16_weights = {"weight": problem.weight.bfloat16().float(), "x": problem.x.bfloat16().float()}
    problem, base = (replace(p, **bf16_weights) for p in (problem, base))

    def run(p: LinearProblem) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            y = smoa_linear(p.x, p.weight, p.bias, p.A, p.B, p.partition, p.ranks, scaling=0.7)
        assert y.dtype == torch.bfloat16
        return y

    assert survival(problem, base, run) == pytest.approx(1.0, abs=0.05)
    assert {call[0].dtype for call in seen} == {torch.bfloat16}
