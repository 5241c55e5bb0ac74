"""PEFT's own layer in half precision delivers a tenth of an update of 1e-4 of the weights (docs/numerics.md).

That every backend here delivers all of it: tests/test_contract.py.
"""

import peft
import pytest
import torch
from problems import Case, LinearProblem, small_update, survival
from torch import Tensor, nn

pytestmark = pytest.mark.numerical


@pytest.mark.parametrize("bias", [True, False])
def test_peft_layers_deliver_a_tenth(bias: bool) -> None:
    """PEFT's HiRA is K = 1: the same update, added to a base output that is already rounded."""
    case = Case("eager", "auto", torch.bfloat16)
    p = small_update(case, tokens=2048, bias=bias)
    linear = nn.Linear(64, 192, bias=bias, dtype=case.dtype).requires_grad_(False)
    linear.weight.data = p.weight
    if p.bias is not None:
        linear.bias.data = p.bias
    config = peft.HiraConfig(r=4, target_modules=["0"])
    layer = peft.inject_adapter_in_model(config, nn.Sequential(linear))[0]

    def run(p: LinearProblem) -> Tensor:
        layer.hira_A["default"].data = p.A.bfloat16()
        layer.hira_B["default"].data = p.scaling * p.B.bfloat16()
        return layer(p.x).detach()

    assert 0.0 < survival(case, p, run)[0] < 0.2
    share, noise = survival(case, p, LinearProblem.forward)
    assert share == pytest.approx(1.0, abs=4 * noise)
