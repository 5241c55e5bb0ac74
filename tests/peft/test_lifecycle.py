"""Configuration per layer, and layers under PEFT's and transformers' operations."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from adapted import adapt, close, config, layers, logits
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounter

from smoa_kernels import BlockPartition
from smoa_kernels.definition.block_rule import BlockRule
from smoa_kernels.peft import SMoAConfig, hotswap
from smoa_kernels.peft.base_weight import BaseWeight

# Configuration by layer


def test_patterns_scaling_and_layers(llama):
    config = SMoAConfig(
        r=8,
        num_blocks=4,
        block_ranks=[5, 1, 0, 2],
        smoa_alpha=16,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "up_proj"],
        exclude_modules=["model.layers.0.mlp.up_proj"],
        rank_pattern={"v_proj": 4},
        alpha_pattern={"layers.1.self_attn.v_proj": 1},
        num_blocks_pattern={"up_proj": 2},
        block_order="contiguous",
        granule=2,
        block_order_pattern={"up_proj": "spectral"},
        granule_pattern={"v_proj": 4},
    )
    model = get_peft_model(llama(), config)
    found = {name.removeprefix("base_model.model.model."): layer for name, layer in layers(model).items()}
    attention = {f"layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"}
    assert set(found) == attention | {"layers.1.mlp.up_proj"}
    assert found["layers.0.self_attn.q_proj"].ranks("default").tolist() == [5, 1, 0, 2]
    assert found["layers.0.self_attn.q_proj"].scaling["default"] == 16 / 8**0.5
    assert found["layers.0.self_attn.v_proj"].ranks("default").tolist() == [1, 1, 1, 1]
    assert found["layers.0.self_attn.v_proj"].scaling["default"] == 8.0
    assert found["layers.1.self_attn.v_proj"].scaling["default"] == 0.5
    assert found["layers.1.mlp.up_proj"].ranks("default").tolist() == [4, 4]
    for name, rule in {
        "layers.0.self_attn.q_proj": BlockRule(4, "contiguous", 2),
        "layers.0.self_attn.v_proj": BlockRule(4, "contiguous", 4),
        "layers.1.mlp.up_proj": BlockRule(2, "spectral", 2),
    }.items():
        assert found[name].settings["default"].rule == rule
        assert found[name].partition("default") == rule.build(found[name].base_weight())
    chosen = get_peft_model(llama(), SMoAConfig(target_modules=["q_proj"], layers_to_transform=[1]))
    assert [name.split(".")[4] for name in layers(chosen)] == ["1"]
    default = get_peft_model(llama(), SMoAConfig())
    assert {name.rsplit(".", 1)[1] for name in layers(default)} == {"q_proj", "v_proj"}


@pytest.mark.numerical
@pytest.mark.parametrize("bias", ["all", "smoa_only"])
def test_biases_train_and_are_saved(gpt2, tokens, tmp_path, bias):
    model = get_peft_model(gpt2(), config(gpt2(), target_modules=["c_fc"], bias=bias, smoa_alpha=0.5))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    of_the_base = [name for name, _ in gpt2().named_parameters() if "bias" in name]
    assert len(trained) == (2 if bias == "smoa_only" else len(of_the_base))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    logits(model, tokens).square().mean().backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(gpt2(), tmp_path).eval()
    assert torch.equal(logits(loaded, tokens), logits(model.eval(), tokens))


def test_layers_keep_their_settings_when_the_configuration_changes(llama):
    model = adapt(llama(), smoa_dropout=0.5)
    model.peft_config["default"].smoa_dropout = 0.0
    assert {layer.settings["default"].smoa_dropout for layer in layers(model).values()} == {0.5}


@pytest.mark.numerical
def test_configuration_without_weights_starts_a_new_adapter(folder, make_model, tokens):
    path, _ = folder
    new = SMoAConfig.from_pretrained(path)
    new.inference_mode = False
    model = get_peft_model(make_model(), new).train()
    logits(model, tokens).sum().backward()
    for layer in layers(model).values():
        assert layer.partition("default") == BlockPartition.from_weight(layer.base_weight(), 3)
        assert layer.smoa["default"].A.grad is not None


# Operations of other libraries


@pytest.mark.numerical
def test_safe_merge_refuses_a_broken_adapter_before_it_writes(llama, monkeypatch):
    model = adapt(llama())
    layer = next(iter(layers(model).values()))
    weight = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.smoa["default"].B.fill_(torch.nan)
    monkeypatch.delattr(BaseWeight, "_write")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)


@pytest.mark.numerical
def test_a_layer_that_computes_something_else_is_called(tokens):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    base = nn.Sequential(Doubled(12, 9))
    x = torch.randn(4, 12)
    expected = base(x)
    model = get_peft_model(base, SMoAConfig(r=4, target_modules=["0"], init_weights=False)).eval()
    layer = next(iter(layers(model).values()))
    delta = layer.get_delta_weight("default")
    close(model(x), expected + x @ delta.T)
    with torch.autocast(x.device.type, torch.bfloat16):  # rounds ΔW, but not the product of its factors
        assert torch.equal(layer.get_delta_weight("default"), delta)
        assert torch.equal(model(x), layer.base_layer(x) + F.linear(x, delta))


def scaled(layer, step):
    """A step that PEFT, diffusers or a user takes with an adapter's scale."""
    name, value = step
    if name == "entry":
        layer.scaling["default"] *= value
    elif name == "all":
        layer.scaling = {key: value * s for key, s in layer.scaling.copy().items()}
    elif name == "set_scale":
        layer.set_scale("default", value)
        layer.set_scale("unknown", value)
    else:
        getattr(layer, name)(value)


SCALES = [
    *(
        ("entry", 10),
        ("unscale_layer", None),
        ("scale_layer", 0.5),
        ("scale_layer", 1),
        ("unscale_layer", 4.0),
    ),
    *(("all", -3.0), ("set_scale", 0.25), ("entry", 0.0), ("set_scale", 1.0)),
]


def test_a_backward_uses_the_scale_of_its_forward():
    """diffusers scales a layer, calls it, and unscales it before the backward."""
    layer = adapt(nn.Sequential(nn.Linear(8, 6)), target_modules=["0"]).base_model.model[0]
    adapter, gradients = layer.smoa["default"], []
    nn.init.normal_(adapter.B)
    for unscaled_first in (False, True):
        layer.scale_layer(0.5)
        loss = layer(torch.ones(3, 8)).square().sum()
        if unscaled_first:
            layer.unscale_layer(0.5)
        adapter.A.grad = None
        loss.backward()
        gradients.append(adapter.A.grad)
        layer.set_scale("default", 1)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("rslora", [False, True])
def test_scales_change_as_loras_do(rslora):
    base, x = nn.Linear(12, 9), torch.randn(4, 12)
    common = {"r": 4, "use_rslora": rslora, "target_modules": ["0"]}
    ours, lora = (
        get_peft_model(nn.Sequential(copy.deepcopy(base)), config).base_model.model[0]
        for config in (
            SMoAConfig(smoa_alpha=6, init_weights=False, **common),
            LoraConfig(lora_alpha=6, init_lora_weights=False, **common),
        )
    )
    update, s = (ours(x) - base(x)).detach(), ours.scaling["default"]
    assert dict(ours.scaling) == lora.scaling
    for step in SCALES:
        for layer in (ours, lora):
            scaled(layer, step)
        assert ours.scaling["default"] == pytest.approx(lora.scaling["default"], rel=1e-15)
        ratio = lora.scaling["default"] / s
        for found in (ours(x) - base(x), x @ ours.get_delta_weight("default").T):
            torch.testing.assert_close(found, ratio * update, rtol=1e-4, atol=1e-5)
    assert repr(ours.scaling) == repr(dict(ours.scaling))
    with pytest.raises(ValueError, match=r"scaling\['default'\] must be finite, got inf"):
        ours.scaling["default"] = float("inf")


@pytest.mark.numerical
def test_a_changed_scale_is_kept_and_compiled_code_reads_it(tmp_path):
    model = adapt(nn.Sequential(nn.Linear(12, 9)), target_modules=["0"], smoa_alpha=7)
    layer, x = model.base_model.model[0], torch.randn(4, 12)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    base, update = layer.base_layer(x), compiled(x) - layer.base_layer(x)
    layer.scaling["default"] /= 3
    close(compiled(x) - base, update / 3, 1e-4)
    assert counter.frame_count == 1
    s = layer.scaling["default"]
    layer.load_state_dict(layer.state_dict())
    other = pickle.loads(pickle.dumps(copy.deepcopy(layer))).half().to("meta").to_empty(device=x.device)
    assert layer.scaling["default"] == other.scaling["default"] == s
    model.save_pretrained(tmp_path)  # as with LoRA, the folder holds the configuration's scale
    hotswap(model, tmp_path)
    assert layer.scaling["default"] == 7 / 5
    layer.delete_adapter("default")
    assert not layer.scaling


@pytest.mark.numerical
def test_over_another_tuners_layers_nothing_is_merged(llama, tokens):
    """Both tuners would write to the same weight, and PEFT unmerges in the wrong order."""
    inner = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(llama(), inner).base_model.model
    model = get_peft_model(model, config(target_modules=["q_proj"], smoa_alpha=0.5)).eval()
    expected = logits(model, tokens)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            RuntimeError, match=r"holds adapters of another tuner .*merge and unload these before"
        ):
            merge()
        assert torch.equal(logits(model, tokens), expected)
