"""Adapters, names and models that the tuner refuses: the error names the cause and nothing changes."""

import copy
import types
from contextlib import contextmanager
from functools import partial

import pytest
import tiny_experts as experts
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from adapted import WEIGHTS, adapt, config, edit_weights, logits, unchanged
from peft import LoraConfig, PeftModel, get_peft_model
from peft.functional import set_adapter
from tiny_experts import BOTH, tiny_experts
from tiny_models import tiny_llama
from torch import nn
from transformers import Llama4ForCausalLM, Llama4TextConfig

from smoa_kernels.peft import Experts, SMoALayer, convert_adapter, hotswap


def with_experts(change):
    model = tiny_experts()
    change(model.model.layers[1].mlp.experts)
    return model


def stored_in(dtype):
    def change(experts):
        experts.down_proj = nn.Parameter(experts.down_proj.to(dtype), requires_grad=False)

    return change


def sharded(experts):
    class Sharded(nn.Parameter):
        def full_tensor(self):
            raise AssertionError

    experts.down_proj = Sharded(experts.down_proj.detach())


def own_forward(experts):
    experts.forward = types.MethodType(type(experts).forward, experts)


def own_class(experts):
    decorated = type(experts)
    own = {"forward": lambda self, *args: decorated.forward(self, *args) + 1}
    experts.__class__ = type("Normalised", (decorated,), own)


def offloaded(experts):
    add_hook_to_module(experts, AlignDevicesHook(execution_device="cpu", offload=True))


def llama4():
    sizes = {"hidden_size": 32, "intermediate_size": 24, "intermediate_size_mlp": 24, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    experts = {"num_hidden_layers": 1, "num_local_experts": 2, "interleave_moe_layer_step": 1}
    return Llama4ForCausalLM(Llama4TextConfig(**sizes, **heads, **experts))


CHANGED = {
    r"1.mlp.experts.down_proj of Qwen3MoeExperts .*float8_e4m3fn.*dequantize=True": stored_in(
        torch.float8_e4m3fn
    ),
    r"of Qwen3MoeExperts .* stored in torch.uint8.*dequantize=True": stored_in(torch.uint8),
    r"of Qwen3MoeExperts .* expert parallel": lambda experts: setattr(experts, "_is_expert_parallel", True),
    r"of Qwen3MoeExperts .* a forward of its own": own_forward,
    r"of Normalised .* a forward of its own around": own_class,
    r"of Qwen3MoeExperts .*a DTensor": sharded,
    r"of Qwen3MoeExperts .* DeepSpeed ZeRO-3": lambda experts: setattr(experts.down_proj, "ds_id", 0),
    r"down_proj of Qwen3MoeExperts .* offloaded by accelerate": offloaded,
}
DO_NOT_FIT = [
    ({"target_parameters": ["mlp.gate.weight"]}, "mlp.gate.weight of Qwen3MoeTopKRouter .*modules_to_save"),
    ({"target_parameters": ["o_proj.weight"]}, "o_proj.weight of Linear .* it is a matrix"),
    ({"target_parameters": ["e.no_proj"]}, r"\['e.no_proj'\] match no parameter.*experts.down_proj"),
    ({"target_parameters": [*BOTH, "dwon_proj"]}, r"\['dwon_proj'\] match no parameter.*experts.down_proj"),
    ({"num_blocks": 33, "r": 64}, "mlp.experts.gate_up_proj: num_blocks must be at most"),
    ({"num_blocks_pattern": {"1.mlp.experts.down_proj": 40}, "r": 64}, "down_proj: num_blocks must be"),
    ({"target_modules": ["experts"]}, "is not supported"),
]
OF_LAYERS = [
    ({"num_blocks": 33, "r": 64}, "num_blocks must be at most .* = 32 .*, got 33; num_blocks_pattern"),
    ({"granule": 16}, "q_proj: granule must leave at least num_blocks=3 granules .* a layer"),
    ({"target_modules": ["q_proj", "input_layernorm"]}, "is not supported"),
    # PEFT wraps the embedding and the norms before it reaches a layer with an adapter.
    ({"modules_to_save": ["embed_tokens", "norm", "j"]}, "modules_to_save cannot be applied to modules"),
]


def offloaded_attention():
    classes = {"preload_module_classes": ["MultiheadAttention"]}
    return cpu_offload(nn.MultiheadAttention(8, 2), execution_device="cpu", **classes)


# Layers that are neither linear nor experts.
OTHERS = [
    (offloaded_attention, {}, "0: an nn.MultiheadAttention that accelerate offloads"),
    (lambda: nn.MultiheadAttention(8, 2), {"smoa_dropout": 0.1}, "smoa_dropout must be 0 where nn.Multihead"),
    (lambda: nn.Conv2d(4, 6, 3), {"num_blocks": 7, "r": 7}, "0: num_blocks must be at most"),
    (lambda: nn.Embedding(9, 6).to(torch.float8_e4m3fn), {}, "of Embedding is torch.float8_e4m3fn"),
    (lambda: nn.Embedding(9, 6, max_norm=0.5), {}, r"must have max_norm=None, got 0\.5"),
    (lambda: nn.ConvTranspose2d(4, 6, 3), {}, "is not supported"),
]


def called(self, *args, **kwargs):
    return nn.MultiheadAttention.forward(self, *args, **kwargs)


DOWN = {"target_parameters": ["1.mlp.experts.down_proj"]}
REFUSED = [
    *((tiny_llama, config(**settings), message) for settings, message in OF_LAYERS),
    *((tiny_experts, experts.config(**settings), message) for settings, message in DO_NOT_FIT),
    *(
        (partial(with_experts, change), experts.config(**DOWN), message)
        for message, change in CHANGED.items()
    ),
    *(
        (
            lambda kind=kind: nn.Sequential(kind(8, 2)),
            config(),
            "0.out_proj: nn.MultiheadAttention reads the weight .*",
        )
        for kind in (nn.MultiheadAttention, type("Attention", (nn.MultiheadAttention,), {"forward": called}))
    ),
    *(
        (lambda make=make: nn.Sequential(make()), config(target_modules=["0"], **settings), message)
        for make, settings, message in OTHERS
    ),
    (
        lambda: tiny_experts().model.layers[0].mlp.experts,
        experts.config(target_parameters=["down_proj"]),
        "it is the whole model",
    ),
    (
        llama4,
        experts.config(target_parameters=["experts.down_proj"]),
        "of Llama4TextExperts cannot be adapted: its class is not one that transformers decorates",
    ),
]


@pytest.mark.parametrize(("make", "settings", "message"), REFUSED, ids=[row[2][:60] for row in REFUSED])
def test_what_cannot_be_adapted(make, settings, message):
    """Neither by a first adapter nor by a second one."""
    error = TypeError if "modules_to_save cannot" in message else ValueError  # PEFT's own
    model, refused = make(), partial(pytest.raises, error, match=message)
    with unchanged(model), refused():
        get_peft_model(model, copy.deepcopy(settings))
    assert not hasattr(model, "peft_config")
    if hasattr(model, "lm_head"):
        first = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
        if model.config.model_type == "qwen3_moe":
            first["target_parameters"] = ["0.mlp.experts.down_proj"]
        model = adapt(model, **first)
        with unchanged(model), refused():
            model.add_adapter("other", copy.deepcopy(settings))
        assert model.active_adapters == ["default"]


@pytest.mark.filterwarnings("ignore:You are trying to modify:UserWarning", "ignore:Already found:UserWarning")
def test_another_tuners_adapter_of_that_name_is_left_alone(llama, tmp_path):
    """PEFT keeps both under one name in one dictionary."""
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    adapt(llama()).save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda state: state.popitem())
    for base in (model, model.get_base_model()):
        for add, message in (
            (
                partial(get_peft_model, base, config(target_modules=["nothing"])),
                "Target modules .* not found",
            ),
            (partial(PeftModel.from_pretrained, base, tmp_path), "the adapter lacks"),
        ):
            with unchanged(model), pytest.raises(ValueError, match=message):
                add()
            assert type(model.peft_config["default"]) is type(base.peft_config["default"]) is LoraConfig


@contextmanager
def ctrl_c_at(name, call, monkeypatch):
    """A KeyboardInterrupt at a certain call of a layer's method."""
    count, method = iter(range(call + 1)), getattr(SMoALayer, name)

    def interrupted(self, *args, **kwargs):
        if next(count) == call:
            raise KeyboardInterrupt
        return method(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SMoALayer, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            yield
    assert next(count, None) is None


def test_an_interrupted_injection_leaves_the_model_alone(llama, monkeypatch):
    model = llama()
    with unchanged(model), ctrl_c_at("update_layer", 2, monkeypatch):
        get_peft_model(model, config())
    assert not hasattr(model, "peft_config")
    adapted = get_peft_model(model, config())
    for add in (
        lambda name: adapted.add_adapter(name, config()),
        lambda name: adapted.add_weighted_adapter(["default"], [0.5], name),
    ):
        with unchanged(adapted), ctrl_c_at("update_layer", 2, monkeypatch):
            add("other")
        add("other")  # the name is free
        adapted.delete_adapter("other")


@pytest.mark.parametrize("name", ["", "a.b", "../elsewhere", "/elsewhere", "a\\b"])
def test_an_adapters_name_is_no_path(llama, name):
    model = llama()
    refused = partial(
        pytest.raises, ValueError, match="adapter_name must be a name without dots or slashes, got"
    )
    with unchanged(model), refused():
        get_peft_model(model, config(), adapter_name=name)
    model = adapt(llama())
    with unchanged(model), refused():
        model.add_adapter(name, config())


# Experts


def test_weights_that_are_elsewhere_are_not_read(tokens):
    """Weights of another replica, or offloaded after injection: reading them would give arbitrary memory."""
    model = experts.adapt(tiny_experts())
    adapted = next(module for module in model.modules() if isinstance(module, Experts))
    adapted.base_layer.to("meta")
    with pytest.raises(
        RuntimeError, match=r"_proj is on meta and the experts' input on cpu: .* nn.DataParallel"
    ):
        model(tokens)


def test_a_weight_takes_one_active_adapter():
    tokens = torch.arange(3, 9)[None]
    model = experts.adapt(tiny_experts())
    model.add_adapter("other", experts.config())
    expected = logits(model, tokens)
    with pytest.raises(ValueError, match="at most one adapter of experts can be active, got default, other"):
        model.base_model.set_adapter(["default", "other"])
    assert torch.equal(logits(model, tokens), expected)
    assert model.active_adapters == ["default"]
    set_adapter(model, ["default", "other"])  # PEFT's function calls one layer after another
    with pytest.raises(ValueError, match="at most one adapter of experts can be active, got default, other"):
        logits(model, tokens)
    model.base_model.set_adapter("default")
    assert torch.equal(logits(model, tokens), expected)
    with pytest.raises(ValueError, match=r"adapters of experts \(target_parameters\) cannot be combined"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
    with pytest.raises(ValueError, match="adapter_names cannot be given where experts are adapted"):
        model(tokens, adapter_names=["default"])
    assert torch.equal(logits(model, tokens), expected)


@pytest.mark.parametrize("expert", [0, 4])
def test_a_damaged_label_names_its_layer_and_nothing_is_loaded(expert, tmp_path):
    experts.adapt(tiny_experts(), target_parameters=["experts.down_proj"]).save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda s: next(t for k, t in s.items() if "row_block" in k)[expert, 5].fill_(100))
    model = tiny_experts()
    corrupt = rf"{WEIGHTS}.*down_proj.row_block must lie in \[0, "
    with unchanged(model), pytest.raises(ValueError, match=corrupt):
        PeftModel.from_pretrained(model, tmp_path)


def test_an_adapter_of_other_experts_is_taken_out_again(tmp_path):
    experts.adapt(tiny_experts(num_experts=5)).save_pretrained(tmp_path / "five")
    experts.adapt(tiny_experts(seed=7)).save_pretrained(tmp_path / "seven")
    model = tiny_experts()
    with unchanged(model), pytest.raises(ValueError, match=r"size mismatch for .*experts.gate_up_proj.A"):
        PeftModel.from_pretrained(model, tmp_path / "five")
    with unchanged(model), pytest.raises(ValueError, match="trained on another base weight in 4 layers"):
        PeftModel.from_pretrained(model, tmp_path / "seven", strict_base=True)
    with pytest.warns(UserWarning, match="trained on another base weight in 4 layers"):
        PeftModel.from_pretrained(model, tmp_path / "seven")
    assert any(isinstance(module, Experts) for module in model.modules())


def test_hira_and_hotswap_have_no_experts(tmp_path):
    model = experts.adapt(tiny_experts(), num_blocks=1, smoa_alpha=5)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"experts.* cannot be exchanged in place"):
        hotswap(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"experts.down_proj: experts have no counterpart in HiRA"):
        convert_adapter(tmp_path / "adapter", tmp_path / "hira")
    assert not (tmp_path / "hira").exists()
