"""What is refused of experts: named, and before anything has changed; and what of PEFT and transformers we rely on."""

import types

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from adapted import WEIGHTS, edit_weights, logits, snapshot
from peft import PeftModel, get_peft_model
from peft.functional import set_adapter
from tiny_experts import BOTH, adapt, config, tiny_experts
from torch import nn
from transformers import Llama4ForCausalLM, Llama4TextConfig

from smoa_kernels.peft import Experts, SMoAConfig, hotswap, smoa_to_hira


def assert_refused(model, settings, message):
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config(**settings))
    names, state = snapshot(model)
    assert names == before[0]
    assert all(torch.equal(value, before[1][key]) for key, value in state.items())
    assert not hasattr(model, "peft_config")


def with_experts(change):
    model = tiny_experts()
    change(model.model.layers[1].mlp.experts)
    return model


def quantize(experts):
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)


def blocks_of_bytes(experts):
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.uint8), requires_grad=False)


def parallel(experts):
    experts._is_expert_parallel = True


def own_forward(experts):
    experts.forward = types.MethodType(type(experts).forward, experts)


def sharded(experts):
    class Sharded(nn.Parameter):
        def full_tensor(self):
            raise AssertionError

    experts.down_proj = Sharded(experts.down_proj.detach())


def partitioned(experts):
    experts.down_proj.ds_id = 0


def offloaded(experts):
    add_hook_to_module(experts, AlignDevicesHook(execution_device="cpu", offload=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (quantize, r"1.mlp.experts.down_proj of Qwen3MoeExperts .*float8_e4m3fn.*dequantize=True"),
        (blocks_of_bytes, r"of Qwen3MoeExperts .* stored in torch.uint8.*dequantize=True"),
        (parallel, r"of Qwen3MoeExperts .* expert parallel"),
        (own_forward, r"of Qwen3MoeExperts .* a forward of its own"),
        (sharded, r"of Qwen3MoeExperts .*a DTensor"),
        (partitioned, r"of Qwen3MoeExperts .* DeepSpeed ZeRO-3"),
    ],
)
def test_modules_that_cannot_be_adapted(change, message):
    assert_refused(with_experts(change), {}, message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_parameters": ["mlp.gate.weight"]},
            "mlp.gate.weight of Qwen3MoeTopKRouter .*modules_to_save",
        ),
        ({"target_parameters": ["q_proj.weight"]}, "q_proj.weight of Linear .* it is a matrix"),
        (
            {"target_parameters": ["experts.no_proj"]},
            r"\['experts.no_proj'\] match no parameter.*experts.down_proj",
        ),
        (
            {"target_parameters": [*BOTH, "experts.dwon_proj"]},
            r"\['experts.dwon_proj'\] match no parameter.*experts.down_proj",
        ),
        ({"num_blocks": 33, "r": 64}, "mlp.experts.gate_up_proj: num_blocks must be at most"),
        ({"target_modules": ["experts"]}, "is not supported"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    assert_refused(tiny_experts(), settings, message)


def test_experts_that_are_the_whole_model():
    experts = tiny_experts().model.layers[0].mlp.experts
    assert_refused(experts, {"target_parameters": ["down_proj"]}, "or is the whole model")


def test_offloaded_experts():
    with pytest.raises(ValueError, match=r"down_proj of Qwen3MoeExperts .* offloaded by accelerate"):
        adapt(with_experts(offloaded), target_parameters=["1.mlp.experts.down_proj"])


def test_weights_that_are_elsewhere_are_not_read(tokens):
    """Such as another replica's, or offloaded after injection: the product would be of whatever memory holds."""
    model = adapt(tiny_experts())
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    experts.base_layer.to("meta")
    with pytest.raises(
        RuntimeError, match=r"_proj is on meta and the experts' input on cpu: .* nn.DataParallel"
    ):
        model(tokens)


def test_classes_that_transformers_does_not_decorate():
    sizes = {"hidden_size": 32, "intermediate_size": 24, "intermediate_size_mlp": 24, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    llama4 = Llama4TextConfig(
        **sizes, **heads, num_hidden_layers=1, num_local_experts=2, interleave_moe_layer_step=1
    )
    assert_refused(
        Llama4ForCausalLM(llama4),
        {"target_parameters": ["experts.down_proj"]},
        "of Llama4TextExperts cannot be adapted: its class is not one that transformers decorates",
    )


def test_dropout_and_targets_that_are_no_list():
    with pytest.raises(ValueError, match=r"smoa_dropout must be 0 where target_parameters"):
        SMoAConfig(target_parameters=BOTH, smoa_dropout=0.1)
    with pytest.raises(TypeError, match="target_parameters must be a list of names"):
        SMoAConfig(target_parameters="experts.down_proj")


def test_a_weight_takes_one_active_adapter():
    tokens = torch.arange(3, 9)[None]
    model = adapt(tiny_experts())
    model.add_adapter("other", config())
    expected = logits(model, tokens)
    with pytest.raises(ValueError, match="at most one adapter of experts can be active, got default, other"):
        model.base_model.set_adapter(["default", "other"])
    assert torch.equal(logits(model, tokens), expected)
    assert model.active_adapters == ["default"]
    set_adapter(model, ["default", "other"])  # PEFT's function asks one layer after another
    with pytest.raises(ValueError, match="at most one adapter of experts can be active, got default, other"):
        logits(model, tokens)
    model.base_model.set_adapter("default")
    assert torch.equal(logits(model, tokens), expected)
    with pytest.raises(ValueError, match=r"adapters of experts \(target_parameters\) cannot be combined"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
    with pytest.raises(ValueError, match="adapter_names cannot be given where experts are adapted"):
        model(tokens, adapter_names=["default"])
    assert torch.equal(logits(model, tokens), expected)


def test_a_failed_second_adapter_leaves_the_first(monkeypatch):
    model = adapt(tiny_experts(), target_parameters=["experts.down_proj"])
    before = snapshot(model)[0]
    with pytest.raises(ValueError, match="num_blocks must be at most"):
        model.add_adapter("other", config(num_blocks_pattern={"layers.1.mlp.experts.down_proj": 40}, r=64))
    assert snapshot(model)[0] == before
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t[4].__setitem__(60, t[4, 60] ^ 1), "down_proj: smoa_blocks of expert 4 is corrupt"),
        (lambda t: t[0].__setitem__(60, t[0, 60] ^ 1), "down_proj: smoa_blocks of expert 0 is corrupt"),
    ],
)
def test_a_damaged_row_names_its_expert_and_nothing_is_loaded(edit, message, tmp_path):
    adapt(tiny_experts(), target_parameters=["experts.down_proj"]).save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda state: edit(next(t for key, t in state.items() if key.endswith("blocks"))))
    model = tiny_experts()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as raised:
        PeftModel.from_pretrained(model, tmp_path)
    assert WEIGHTS in str(raised.value)
    assert snapshot(model)[0] == before[0]


def test_an_adapter_of_other_experts_is_taken_out_again(tmp_path):
    adapt(tiny_experts(num_experts=5)).save_pretrained(tmp_path / "five")
    adapt(tiny_experts(seed=7)).save_pretrained(tmp_path / "seven")
    model = tiny_experts()
    before = snapshot(model)[0]
    with pytest.raises(ValueError, match=r"size mismatch for .*experts.gate_up_proj.smoa_A"):
        PeftModel.from_pretrained(model, tmp_path / "five")
    assert snapshot(model)[0] == before
    with pytest.raises(ValueError, match="trained over another base weight in 4 layers"):
        PeftModel.from_pretrained(model, tmp_path / "seven", strict_base=True)
    assert snapshot(model)[0] == before
    with pytest.warns(UserWarning, match="trained over another base weight in 4 layers"):
        PeftModel.from_pretrained(model, tmp_path / "seven")
    assert any(isinstance(module, Experts) for module in model.modules())


def test_hira_and_hotswap_have_no_experts(tmp_path):
    model = adapt(tiny_experts(), num_blocks=1, smoa_alpha=5)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"experts.* cannot be exchanged in place"):
        hotswap(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"experts.down_proj: experts have no counterpart in HiRA"):
        smoa_to_hira(tmp_path / "adapter", tmp_path / "hira")
    assert not (tmp_path / "hira").exists()
