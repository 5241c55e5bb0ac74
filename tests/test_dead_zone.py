"""PEFT's own layer in half precision delivers a fifth of an update of 3e-4 of the weights (docs/numerics.md).

tests/test_contract.py shows that every backend delivers all of it. This file tests the cuBLAS settings for that.
"""

import peft
import pytest
import torch
from problems import Case, LinearProblem, if_it_runs, small_update, survival
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from smoa_kernels.definition.precision import accumulate

pytestmark = pytest.mark.numerical
REDUCTIONS = {
    torch.bfloat16: "allow_bf16_reduced_precision_reduction",
    torch.float16: "allow_fp16_reduced_precision_reduction",
}


@pytest.mark.parametrize("bias", [True, False])
def test_peft_layers_deliver_a_fifth(bias: bool) -> None:
    """PEFT's HiRA is K = 1: it adds the same update to a base output that is already rounded."""
    case = Case("eager", "auto", torch.bfloat16)
    p = small_update(case, 256, bias, 1024, 3e-4)
    linear = nn.Linear(1024, 192, bias=bias, dtype=case.dtype).requires_grad_(False)
    linear.weight.data = p.weight
    if p.bias is not None:
        linear.bias.data = p.bias
    config = peft.HiraConfig(r=4, target_modules=["0"])
    layer = peft.inject_adapter_in_model(config, nn.Sequential(linear))[0]

    def run(p: LinearProblem) -> Tensor:
        layer.hira_A["default"].data = p.A.bfloat16()
        layer.hira_B["default"].data = p.scaling * p.B.bfloat16()
        return layer(p.x).detach()

    assert 0.0 < survival(case, p, run)[0] < 0.3
    assert survival(case, p, LinearProblem.forward)[0] == pytest.approx(1.0, abs=0.1)


class Settings(TorchDispatchMode):
    """Notes the cuBLAS settings at each product; the second product fails."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[bool, bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.addmm_.default:
            self.found.append(setting(args[0].dtype))
            if len(self.found) == 2:
                raise RuntimeError("out of memory")
        return func(*args, **(kwargs or {}))


def setting(dtype: torch.dtype) -> tuple[bool, bool]:
    """Whether partial sums may be rounded, and whether a GEMM may be split along C."""
    matmul, name = torch.backends.cuda.matmul, REDUCTIONS[dtype]
    return getattr(matmul, name), getattr(matmul, f"{name}_split_k")


@pytest.mark.parametrize("users", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", REDUCTIONS)
def test_partial_sums_are_not_rounded(dtype: torch.dtype, users: tuple[bool, bool]) -> None:
    """The settings hold during the base GEMM, and the user's settings return afterwards, also after an error.

    torch's fake tensors pretend to be on a GPU and hold no data.
    """
    before = setting(dtype)
    setattr(torch.backends.cuda.matmul, REDUCTIONS[dtype], users)
    try:
        with FakeTensorMode(), Settings() as settings:
            y, x, weight = (torch.empty(4, 4, dtype=dtype, device="cuda:0") for _ in range(3))
            accumulate(y, x, weight)
            assert setting(dtype) == users
            with pytest.raises(RuntimeError, match="out of memory"):
                accumulate(y, x, weight)
        assert settings.found == [(False, users[1])] * 2
        assert setting(dtype) == users
    finally:
        setattr(torch.backends.cuda.matmul, REDUCTIONS[dtype], before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [64, 128, 256])
@pytest.mark.parametrize("dtype", REDUCTIONS)
@pytest.mark.parametrize("backend", map(if_it_runs, ("eager", "triton")))
def test_a_small_update_survives_a_long_sum(backend: str, dtype: torch.dtype, tokens: int) -> None:
    """cuBLAS splits C when tokens are few and columns many: 192 rows of y leave most of a GPU idle."""
    case = Case(backend, "split", dtype)
    p = small_update(case, tokens, bias=False, in_features=14336)
    share, noise = survival(case, p, lambda p: p.forward(**case.options))
    assert abs(share - 1) < max(0.05, 4 * noise)
