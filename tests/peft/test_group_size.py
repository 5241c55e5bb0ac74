"""Adapters with `group_size` in PEFT's life cycle."""

import pytest
import torch
from adapted import adapt, close, config, edit_weights, layer_list, loaded, logits
from peft import LoraConfig, PeftModel, get_peft_model
from quantized_bases import load
from safetensors.torch import load_file
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from smoa_kernels import BlockPartition, FusedSMoALinear
from smoa_kernels.adapter_folder.inspecting import inspect_adapter
from smoa_kernels.peft import SMoAConfig, dequantize, hotswap, merge_to_folder


def packed(**settings):
    weights = {"num_bits": 4, "strategy": "group", "group_size": 8, **settings}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


GROUPED = {"group_size": 8, "num_blocks": 2}


@torch.no_grad()
def test_the_life_cycle(tokens, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = adapt(tiny_llama(), **GROUPED)
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter", strict_base=True).eval()
    assert torch.equal(logits(again, tokens), expected)
    report = inspect_adapter(tmp_path / "adapter")
    assert report.parameters == sum(layer.smoa["default"].num_parameters for layer in layer_list(model))
    other = adapt(tiny_llama(), block_order="random", **GROUPED)
    other.save_pretrained(tmp_path / "other")
    swapped = adapt(tiny_llama(), block_order="random", block_seed=3, **GROUPED)
    hotswap(swapped, tmp_path / "other")
    assert torch.equal(logits(swapped, tokens), logits(other, tokens))
    merge_to_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    close(logits(loaded(tmp_path / "merged"), tokens), expected, 1e-4)
    close(logits(model.merge_and_unload(), tokens), expected, 1e-4)


@torch.no_grad()
def test_sums_of_adapters_are_grouped_too(tokens):
    model = adapt(tiny_llama(), **GROUPED)
    model.add_adapter("other", config(r=4, group_size=8, num_blocks=4, block_order="random"))
    model.add_weighted_adapter(["default", "other"], [0.5, -1.5], "sum")
    model.base_model.set_adapter(["default", "other"])
    for layer in layer_list(model):
        layer.scaling["default"], layer.scaling["other"] = 0.5, -1.5
    expected = logits(model, tokens)
    model.set_adapter("sum")
    close(logits(model, tokens), expected, 1e-4)
    assert all(layer.smoa["sum"].A.shape[1] * 8 == layer.in_features for layer in layer_list(model))
    model.add_adapter("plain", config())
    with pytest.raises(ValueError, match=r"must have one group_size to be combined, got \[1, 8\]"):
        model.add_weighted_adapter(["default", "plain"], [1.0, 1.0], "mixed")


def test_the_groups_of_the_base(quantizable, tmp_path):
    chosen = SMoAConfig(r=4, num_blocks=1, target_modules="all-linear", group_size="base")
    model = adapt(load(quantizable, "nf4"))
    model.add_adapter("grouped", chosen)
    assert model.peft_config["grouped"].group_size == 64
    assert chosen.group_size == "base"
    for layer in layer_list(model):
        assert layer.smoa["grouped"].A.shape[1] == -(-layer.in_features // 64)
    with pytest.raises(ValueError, match='group_size="base" takes a model whose weights share scales'):
        adapt(tiny_llama(), group_size="base", num_blocks=1)


GPTQ = {"quant_method": "gptq", "bits": 4}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({**GPTQ, "group_size": 8}, 8),
        ({**GPTQ, "group_size": 8, "desc_act": True}, None),
        ({**GPTQ, "group_size": 8, "desc_act": True, "static_groups": True}, 8),
        ({**GPTQ, "group_size": -1, "desc_act": True}, 2**31 - 1),
        (packed(actorder="group"), None),
        (packed(actorder="weight"), 8),
    ],
)
def test_groups_that_are_not_of_adjacent_columns_are_refused_before_training(settings, expected):
    base = tiny_llama()
    base.config.quantization_config = settings
    if expected is None:
        with pytest.raises(
            ValueError, match=r"of adjacent columns.* with groups of \[8\] columns in act-order"
        ):
            adapt(base, group_size="base", num_blocks=1)
    else:
        assert adapt(base, group_size="base", num_blocks=1).peft_config["default"].group_size == expected


@torch.no_grad()
def test_four_bits_in_and_four_bits_out(quantizable, tokens, tmp_path):
    """An adapter that was trained on an NF4 model merges into its file: the codes stay, the model answers the same."""
    load(quantizable, "nf4").save_pretrained(tmp_path / "base")
    model = adapt(loaded(tmp_path / "base"), group_size="base", num_blocks=1)
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    merge_to_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    assert all(torch.equal(before[key], after[key]) for key in before if key.endswith("proj.weight"))
    # Dequantised, since bitsandbytes' own product for CPUs rounds to bfloat16.
    found, plain = (logits(loaded(tmp_path / name).dequantize(), tokens) for name in ("merged", "base"))
    close(found, expected, 1e-4)
    assert (plain - expected).norm() > 0.01 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("nested", [False, True])
def test_merging_in_memory_multiplies_the_scales(quantizable, nested):
    kind = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested)
    base = AutoModelForCausalLM.from_pretrained(quantizable, quantization_config=kind, device_map="cpu")
    model = adapt(base, group_size="base", num_blocks=1)
    model.add_adapter("wider", config(group_size=128, num_blocks=1, target_modules="all-linear"))
    for layer in layer_list(model):
        W0, codes = layer.base_weight(), layer.base_layer.weight.data.clone()
        for names in (["default"], ["wider"]):
            layer.merge(adapter_names=names)
            W_eff = W0 + sum(layer.get_delta_weight(name) for name in layer.merged_adapters)
            torch.testing.assert_close(
                dequantize.read_weight(layer.quantization_backend, layer.base_layer), W_eff
            )
            assert torch.equal(layer.base_layer.weight.data, codes)
        layer.unmerge()
        assert torch.equal(dequantize.read_weight(layer.quantization_backend, layer.base_layer), W0)


def test_blocks_that_cut_a_group_are_refused_at_every_door(tmp_path):
    linear = torch.nn.Linear(64, 32)
    cut = BlockPartition.from_weight(linear.weight, 2)
    with pytest.raises(
        ValueError, match="partition must have blocks of columns that end at groups of group_size=16"
    ):
        FusedSMoALinear.from_linear(linear, r=4, group_size=16, partition=cut)
    layer = FusedSMoALinear.from_linear(linear, r=4, group_size=16)
    state = layer.state_dict()
    state["smoa.col_block"] = cut.col_block
    with pytest.raises(ValueError, match="col_block must have blocks of columns that end at groups"):
        layer.load_state_dict(state)
    model = adapt(tiny_llama(), **GROUPED)
    model.save_pretrained(tmp_path)

    def edit(state):
        labels = next(tensor for key, tensor in state.items() if key.endswith("col_block"))
        labels[0] = 1 - labels[0]

    edit_weights(tmp_path, edit)
    with pytest.raises(ValueError, match="col_block must have blocks of columns that end at groups"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_too_few_groups_are_named():
    with pytest.raises(
        ValueError, match="group_size must leave at least num_blocks=2 groups of the 64 columns"
    ):
        FusedSMoALinear(64, 8, group_size=64)


def test_hotswap_refuses_another_group_size_of_the_same_shapes(tmp_path):
    def model(group_size):
        base = torch.nn.Sequential(torch.nn.Linear(96, 8))
        return adapt(base, group_size=group_size, num_blocks=1, target_modules=["0"])

    torch.manual_seed(0)
    model(48).save_pretrained(tmp_path)
    torch.manual_seed(0)
    with pytest.raises(
        ValueError, match="group_size must be the same, got 48 in the folder and 64 in the model"
    ):
        hotswap(model(64), tmp_path)


@torch.no_grad()
def test_an_interrupted_rescaling_leaves_the_old_scales(quantizable, monkeypatch):
    layer = layer_list(adapt(load(quantizable, "nf4"), group_size="base", num_blocks=1))[0]
    base, W0, x = layer.base_layer, layer.base_weight(), torch.randn(3, layer.in_features)
    expected, put = layer(x), type(base).__setattr__

    def interrupted(self, name, value):
        if name == "quant_state":
            raise KeyboardInterrupt
        put(self, name, value)

    with monkeypatch.context() as during:
        during.setattr(type(base), "__setattr__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            layer.merge()
    assert not layer.merged
    assert torch.equal(layer.base_weight(), W0)
    assert torch.equal(layer(x), expected)


@torch.no_grad()
def test_unmerging_leaves_another_tuners_layer_in_its_place(quantizable):
    base = get_peft_model(load(quantizable, "nf4"), LoraConfig(r=2, target_modules=["q_proj"]))
    base.merge_adapter()
    model = adapt(base.base_model.model, group_size="base", num_blocks=1, target_modules=["q_proj"])
    layer = layer_list(model)[0]
    lora = layer.base_layer
    layer.merge()
    layer.unmerge()
    assert layer.base_layer is lora
    assert lora.merged
