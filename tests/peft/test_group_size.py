"""Adapters with `group_size` in PEFT's life cycle."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from adapted import adapt, close, config, edit_weights, layer_list, loaded, logits, unchanged
from packed_bases import GROUP, LAYERS, GptqLinear, gptq, in_order, real_gptq_linear, small_llama, write_base
from peft import LoraConfig, PeftModel, get_peft_model
from quantized_bases import load
from safetensors.torch import load_file
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from smoa_kernels import BlockPartition, FusedSMoALinear
from smoa_kernels.adapter_folder.inspecting import inspect_adapter
from smoa_kernels.adapter_folder.quantized_formats import FORMATS
from smoa_kernels.cli import main
from smoa_kernels.peft import SMoAConfig, convert_adapter, dequantize, hotswap, merge_to_folder


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
        ({**GPTQ, "group_size": 8, "desc_act": True, "g_idx": True}, 8),
        ({**GPTQ, "group_size": 8, "desc_act": True, "static_groups": True}, 8),
        ({**GPTQ, "group_size": -1, "desc_act": True}, 2**31 - 1),
        (packed(actorder="group"), None),
        (packed(actorder="weight"), 8),
    ],
)
def test_a_base_in_act_order_holds_its_groups_or_is_refused_before_training(settings, expected):
    base = tiny_llama()
    base.config.quantization_config = settings
    for name in LAYERS if settings.get("g_idx") else ():
        linear = base.get_submodule(name)
        linear.g_idx = in_order(linear.weight, 8)
    if expected is None:
        with unchanged(base), pytest.raises(ValueError, match=r"q_proj: group_size=\"base\" .* has no g_idx"):
            adapt(base, group_size="base", num_blocks=1, target_modules=["q_proj"])
    else:
        model = adapt(base, group_size="base", num_blocks=1)
        assert model.peft_config["default"].group_size == expected


def gptq_base(packed):
    """The small model, its linear layers packed in act-order."""
    base = small_llama()
    base.config.quantization_config = {**GPTQ, "group_size": GROUP, "desc_act": True}
    for name, each in packed.items():
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, GptqLinear(each))
    return base


def dequantized(packed):
    base = small_llama()
    for name, each in packed.items():
        base.get_submodule(name).weight.data = each.weight
    return base.eval()


@pytest.mark.parametrize(("order", "blocks"), [("spectral", 2), ("contiguous", 2), ("random", 1)])
def test_act_order(order, blocks, tokens, tmp_path):
    """Trained over GPTQ layers, saved, loaded, trained on, exchanged, merged into the base's scales."""
    packed = write_base(tmp_path / "base", "GPTQ, act-order")
    chosen = {"r": 4, "num_blocks": blocks, "block_order": order, "target_modules": LAYERS}
    model = adapt(gptq_base(packed), group_size="base", **chosen)
    for name, layer in zip(LAYERS, layer_list(model), strict=True):
        adapter = layer.smoa["default"]
        assert torch.equal(adapter.col_group, packed[name].groups.int())
        assert adapter.A.shape[1] * GROUP == layer.in_features

    def step(model):
        model.train().zero_grad()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
        logits(model, tokens).square().mean().backward()
        optimizer.step()
        return logits(model.eval(), tokens).detach()

    before = logits(model, tokens).detach()
    trained = step(model)
    assert not torch.equal(trained, before)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(gptq_base(packed), tmp_path / "adapter", is_trainable=True)
    assert torch.equal(logits(again.eval(), tokens), trained)
    plain = dequantized(packed)
    with unchanged(plain), pytest.raises(ValueError, match=r"loses .*\.col_group: load by PeftModel"):
        plain.load_adapter(str(tmp_path / "adapter"))
    over_plain = PeftModel.from_pretrained(dequantized(packed), tmp_path / "adapter", strict_base=True).eval()
    close(logits(over_plain, tokens), trained)
    assert torch.equal(step(again), step(model))
    for layer, other in zip(layer_list(model), layer_list(over_plain), strict=True):
        copies = layer.smoa["default"].state_dict(), other.smoa["default"].state_dict()
        assert torch.equal(*(copy["col_group"] for copy in copies))
    positions = [layer.smoa["default"]._position for layer in layer_list(model)]
    hotswap(model, tmp_path / "adapter")
    for layer, held in zip(layer_list(model), positions, strict=True):
        assert layer.smoa["default"]._position is held  # a CUDA graph captured before reads it
    assert torch.equal(logits(model, tokens), trained)
    report = inspect_adapter(tmp_path / "adapter", tmp_path / "base")
    assert report.parameters == sum(layer.smoa["default"].num_parameters for layer in layer_list(model))
    assert max(layer.base_distance for layer in report.layers) < 1e-3
    merge_to_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged, files = dequantized(packed), (tmp_path / "merged").glob("*.safetensors")
    state = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for name in LAYERS:
        tensors = {key[len(name) + 1 :]: own for key, own in state.items() if key.startswith(f"{name}.")}
        weight = FORMATS["gptq"].read(tensors, GPTQ)
        assert torch.equal(weight.codes(), packed[name].codes)
        merged.get_submodule(name).weight.data = weight.dequantize()
    close(logits(merged, tokens), trained, 1e-2)
    with pytest.raises(TypeError, match="a GPTQ layer takes no merged weight: save the adapter, and merge"):
        model.merge_adapter()


@torch.no_grad()
def test_adapters_in_act_order_beside_others(tokens, tmp_path):
    """Sums keep the groups; other groups are neither summed nor exchanged; HiRA gets all columns."""
    packed = write_base(tmp_path / "base", "GPTQ, act-order")
    model = adapt(gptq_base(packed), group_size="base", r=4, num_blocks=1, target_modules=LAYERS)
    same = {"r": 4, "num_blocks": 1, "block_order": "contiguous", "target_modules": LAYERS}
    model.add_adapter("second", config(group_size="base", **same))
    model.add_adapter("adjacent", config(group_size=GROUP, **same))
    model.add_adapter("copy", model.peft_config["second"])  # as TRL does
    model.add_weighted_adapter(["default", "second"], [0.5, -1.5], "sum")
    for layer in layer_list(model):
        deltas = [layer.get_delta_weight(name) for name in ("default", "second", "sum")]
        close(0.5 * deltas[0] - 1.5 * deltas[1], deltas[2], 1e-4)
        assert torch.equal(layer.smoa["copy"].col_group, layer.smoa["second"].col_group)
    with pytest.raises(ValueError, match="q_proj: adapters must have one col_group to be combined"):
        model.add_weighted_adapter(["default", "adjacent"], [1.0, 1.0], "mixed")
    model.save_pretrained(tmp_path, selected_adapters=["adjacent", "default"])
    with pytest.raises(ValueError, match="q_proj: col_group must be the same in the folder and in the model"):
        hotswap(model, tmp_path / "adjacent", "second")
    convert_adapter(tmp_path, tmp_path / "hira")
    model.set_adapter("default")
    hira = PeftModel.from_pretrained(dequantized(packed), tmp_path / "hira").eval()
    close(logits(hira, tokens), logits(model, tokens), 1e-4)
    with pytest.raises(ValueError, match=r"are not the base's, which has . scales"):
        merge_to_folder(tmp_path / "base", tmp_path / "adjacent", tmp_path / "merged")


def moved(groups):
    groups[groups.argmax()] = 0


def too_high(groups):
    groups += 1


def across_blocks(groups):
    groups.copy_(groups.roll(1))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (moved, r"q_proj.col_group must put 64 columns into groups 0 to 1, group_size=32 into each"),
        (too_high, "q_proj.col_group must put 64 columns"),
        (lambda groups: groups[1:], r"q_proj.col_group must put 64 columns .* in shape \(63,\)"),
        (lambda groups: groups.float(), "q_proj.col_group must be an integer tensor, got torch.float32"),
        (
            across_blocks,
            "q_proj.col_block must have blocks of columns that consist of groups of group_size=32",
        ),
    ],
)
def test_damaged_groups_are_refused_at_the_door(edit, message, tmp_path):
    packed = write_base(tmp_path / "base", "GPTQ, act-order")
    model = adapt(gptq_base(packed), group_size="base", num_blocks=2, target_modules=["q_proj"])
    model.save_pretrained(tmp_path)

    def change(state):
        key = next(key for key in state if key.endswith("q_proj.smoa.col_group"))
        edited = edit(state[key])
        state[key] = (state[key] if edited is None else edited).contiguous()

    edit_weights(tmp_path, change)
    base = gptq_base(packed)
    with unchanged(base), pytest.raises((TypeError, ValueError), match=message):
        PeftModel.from_pretrained(base, tmp_path)
    assert main(["inspect", str(tmp_path)]) == 2


def test_groups_of_another_size_than_the_models_are_refused_before_training(tmp_path):
    packed = write_base(tmp_path / "base", "GPTQ, act-order")
    base = gptq_base(packed)
    base.config.quantization_config["group_size"] = 16
    with (
        unchanged(base),
        pytest.raises(ValueError, match="q_proj: g_idx must put 64 columns into groups 0 to 3"),
    ):
        adapt(base, group_size="base", num_blocks=1, target_modules=["q_proj"])


@pytest.mark.parametrize("ordered", [True, False])
def test_adjacent_groups_of_another_size_are_refused_too(ordered, tmp_path):
    """gptqmodel can give a layer its own size ("dynamic")."""
    packed = write_base(tmp_path / "base", "GPTQ, act-order")
    base = gptq_base(packed)
    base.config.quantization_config["desc_act"] = ordered
    for name in LAYERS:
        base.get_submodule(name).g_idx = torch.arange(base.get_submodule(name).in_features) // (2 * GROUP)
    with unchanged(base), pytest.raises(ValueError, match="q_proj: g_idx must put 64 columns into groups"):
        adapt(base, group_size="base", num_blocks=1, target_modules=["q_proj"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"online_full_had": True}, r"rotates its input \(online_full_had"),
        ({"online_partial_had": True}, r"rotates its input \(online_full_had"),
        ({"QUANT_TYPE": "torch_fused"}, "the weight of GptqLinear is qweight, which SMoA reads in"),
    ],
)
def test_layers_of_gptqmodel_that_compute_otherwise_are_refused(changes, message, tmp_path):
    """Some rotate x, and some repack their weight when they first run."""
    base = gptq_base(write_base(tmp_path / "base", "GPTQ, act-order"))
    for key, value in changes.items():
        setattr(base.get_submodule(LAYERS[0]), key, value)
    with unchanged(base), pytest.raises(ValueError, match=message):
        adapt(base, group_size="base", num_blocks=1, target_modules=LAYERS)


@torch.no_grad()
def test_act_order_while_accelerate_offloads_buffers(tokens, tmp_path):
    packed = write_base(tmp_path / "base", "GPTQ, act-order")
    model = adapt(gptq_base(packed), group_size="base", num_blocks=2, target_modules=LAYERS)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(dequantized(packed), tmp_path).eval()
    expected = logits(loaded, tokens)
    cpu_offload(loaded, offload_buffers=True)
    assert torch.equal(logits(loaded, tokens), expected)
    loaded.add_adapter("copy", loaded.peft_config["default"])
    kept = layer_list(model)
    for layer, own in zip(layer_list(loaded), kept, strict=True):
        assert torch.equal(layer.smoa["copy"].col_group, own.smoa["default"].col_group)


@torch.no_grad()
def test_a_fused_layer_takes_adjacent_groups_only():
    layer = FusedSMoALinear.from_linear(torch.nn.Linear(16, 6), r=2, num_blocks=1, group_size=4)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    given = {f"0.{key}": value for key, value in before.items()}
    given["0.smoa.col_group"] = torch.arange(16).flip(0) // 4
    with pytest.raises(
        ValueError, match=r"0\.smoa\.col_group: FusedSMoALinear takes groups of adjacent columns"
    ):
        torch.nn.Sequential(layer).load_state_dict(given)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_the_layer_of_gptqmodel():
    """It is read as the layer that stands for it in these tests."""
    pytest.importorskip("gptqmodel", reason="not installed")
    pack, _ = gptq(4, "gptq_v2", order=True, zeros=True)
    packed, found = pack(0.05 * torch.randn(64, 128), GROUP), []
    for kind in (GptqLinear, real_gptq_linear):
        base = torch.nn.Sequential(kind(packed))
        base.config = SimpleNamespace(
            quantization_config={**GPTQ, "group_size": GROUP, "desc_act": True}, model_type="-"
        )
        torch.manual_seed(0)
        (layer,) = layer_list(adapt(base, group_size="base", num_blocks=2, target_modules=["0"]))
        found.append((layer.smoa["default"].col_group, layer(torch.ones(3, 128))))
    assert torch.equal(found[0][0], found[1][0])
    close(found[1][1], found[0][1], 1e-3)


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
