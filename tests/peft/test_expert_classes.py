"""Every expert class in transformers: the adapted class agrees with its own forward."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers
from adapted_experts import assert_within_budget
from peft import get_peft_model
from tiny_experts import config
from torch import nn
from transformers import PreTrainedConfig
from transformers.integrations import moe

from smoa_kernels.peft import Experts

pytestmark = pytest.mark.slow

MODELS = Path(transformers.__file__).parent / "models"
DECORATED = re.compile(r"^@use_experts_implementation\b.*\nclass (\w+)", re.MULTILINE)
CLASSES = [
    (f"{path.parent.name}.{path.stem}", name)
    for path in sorted(MODELS.glob("*/modeling_*.py"))
    for name in DECORATED.findall(path.read_text(encoding="utf-8"))
    # Only a base: Ergo's experts normalise what it computes, which tests/peft/test_refused.py refuses.
    if name != "ErgoExpertProjections"
]
# Names that the classes use for their sizes.
TINY = PreTrainedConfig(
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 6),
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("hidden_act", "hidden_activation", "mlp_hidden_act"), "silu"),
    swiglu_alpha=1.702,
    swiglu_limit=7.0,
    swiglu_limits=[7.0],
    limit_after_act=True,
    mlp_gate_softcap=3.0,
    mlp_up_softcap=3.0,
    moe_latent_size=None,
    post_norm_eps=1e-6,
    experts_implementation="grouped_mm",
)


@pytest.mark.parametrize(("module", "name"), CLASSES, ids=[name for _, name in CLASSES])
def test_class(module, name):
    experts_class = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    assert experts_class.__init__.__code__.co_filename == moe.__file__  # the decorator's `__init__`
    torch.manual_seed(0)
    of_a_layer = (
        {"layer_idx": 0} if "layer_idx" in inspect.signature(experts_class.__init__).parameters else {}
    )
    plain = experts_class(TINY, **of_a_layer)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(0, 0.1)
    x, index, routing = torch.randn(9, 32), torch.randint(6, (9, 2)), torch.rand(9, 2)
    expected = plain(x, index, routing)
    targets = [f"experts.{weight}" for weight, parameter in plain.named_parameters() if parameter.ndim == 3]
    settings = config(target_parameters=targets, init_weights=True)
    model = get_peft_model(nn.ModuleDict({"experts": plain}), settings)
    (experts,) = (module for module in model.modules() if isinstance(module, Experts))
    assert len(experts.weights) == 2
    assert torch.equal(experts(x, index, routing), expected)
    with torch.no_grad():
        for weight in experts.weights.values():
            weight.smoa["default"].B.normal_()
    assert_within_budget(experts, torch.float32)
