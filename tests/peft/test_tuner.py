"""Common PEFT calls on tiny Llama (nn.Linear) and GPT-2 (Conv1D) models."""

import json

import pytest
import torch
from adapted import WEIGHTS, adapt, layers, logits, nudge
from peft import HiraConfig, PeftModel, get_peft_model
from peft.tuners.hira.layer import HiraLayer
from safetensors.torch import load_file

from smoa_kernels import BlockPartition
from smoa_kernels.adapter_folder.format import blocks_size, pack_blocks, unpack_blocks
from smoa_kernels.definition.reference import reference_delta_weight
from smoa_kernels.definition.sketch import sketch_weight
from smoa_kernels.peft import SMoAConfig
from smoa_kernels.peft.base_weight import BaseWeight


def refuse_spectra(monkeypatch):
    def refuse(*_):
        raise AssertionError("a spectral order was computed")

    monkeypatch.setattr("smoa_kernels.definition.spectral_order.spectral_centroids", refuse)


# The layer computes the definition


@pytest.mark.numerical
def test_fresh_adapter_is_an_identity_and_only_its_factors_train(make_model, tokens):
    base = logits(make_model(), tokens)
    model = adapt(make_model(), init_weights=True)
    torch.testing.assert_close(logits(model, tokens), base)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(name.split(".")[-2] in ("smoa_A", "smoa_B") for name in trained)


@pytest.mark.numerical
def test_layer_equals_the_reference(make_model):
    model = adapt(make_model(), smoa_alpha=3.0)
    for layer in layers(model).values():
        x = torch.randn(4, layer.in_features)
        partition, ranks = layer.partition("default"), layer.ranks("default")
        weight = layer.base_weight()
        assert partition == BlockPartition.from_weight(weight, 3)
        delta = reference_delta_weight(
            weight, layer.smoa_A["default"], layer.smoa_B["default"], partition, ranks, scaling=3 / 5
        )
        torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ delta.T, rtol=1e-5, atol=1e-5)
        stored = layer.get_delta_weight("default")
        assert stored.shape == layer.base_layer.weight.shape
        torch.testing.assert_close(stored.T if layer.fan_in_fan_out else stored, delta, rtol=1e-5, atol=1e-6)


@pytest.mark.numerical
def test_one_block_is_hira(make_model, tokens):
    conv1d = make_model().config.model_type == "gpt2"
    ours = adapt(make_model(), r=4, num_blocks=1)
    targets = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    hira_config = HiraConfig(
        r=4, target_modules={"c_attn", "c_proj", "c_fc"} if conv1d else targets, fan_in_fan_out=conv1d
    )
    theirs = get_peft_model(make_model(), hira_config).eval()
    hira = {name: module for name, module in theirs.named_modules() if isinstance(module, HiraLayer)}
    assert hira.keys() == layers(ours).keys()
    with torch.no_grad():
        for name, layer in layers(ours).items():
            layer.smoa_B["default"].mul_(0.2)
            hira[name].hira_A["default"].copy_(layer.smoa_A["default"])
            hira[name].hira_B["default"].copy_(layer.smoa_B["default"])
    outputs = [logits(model, tokens) for model in (ours, theirs)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    for output in outputs:
        output.square().sum().backward()
    for name, layer in layers(ours).items():
        A, B = hira[name].hira_A["default"].grad, hira[name].hira_B["default"].grad
        torch.testing.assert_close(
            layer.smoa_A["default"].grad, A, rtol=1e-4, atol=1e-4 * A.abs().max().item()
        )
        torch.testing.assert_close(
            layer.smoa_B["default"].grad, B, rtol=1e-4, atol=1e-4 * B.abs().max().item()
        )
    merged = [model.merge_and_unload().state_dict() for model in (ours, theirs)]
    assert merged[0].keys() == merged[1].keys()
    for name, weight in merged[0].items():
        torch.testing.assert_close(weight, merged[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.numerical
def test_float32_factors_over_a_bf16_base_upcast_nothing(make_model, tokens):
    model = adapt(make_model().bfloat16())
    kinds = set()
    for layer in layers(model).values():
        assert layer.smoa_A["default"].dtype == torch.float32
        x = torch.randn(40, layer.in_features, dtype=torch.bfloat16)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kinds.add((t.dtype, t.shape)) or t, lambda t: t
        ):
            assert layer(x).dtype == torch.bfloat16
    wide = [shape for dtype, shape in kinds if dtype == torch.float32 and len(shape) == 2 and min(shape) > 2]
    assert not wide
    logits(model, tokens).float().square().sum().backward()


@pytest.mark.numerical
def test_a_dropped_input_is_the_adapters_alone(llama):
    model = adapt(llama(), smoa_dropout=0.5)
    layer = next(iter(layers(model).values()))
    x = torch.randn(8, layer.in_features)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    with torch.no_grad():
        layer.smoa_B["default"].zero_()
    torch.testing.assert_close(layer(x), layer.base_layer(x))


def test_layers_keep_their_settings_when_the_configuration_changes(llama):
    model = adapt(llama(), smoa_dropout=0.5)
    model.peft_config["default"].smoa_dropout = 0.0
    assert {layer.settings["default"].config.smoa_dropout for layer in layers(model).values()} == {0.5}


# Saving and loading


@pytest.mark.numerical
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_loading_computes_no_spectral_order(
    folder, make_model, tokens, monkeypatch, low_cpu_mem_usage, is_trainable
):
    path, expected = folder
    refuse_spectra(monkeypatch)
    kwargs = {"low_cpu_mem_usage": low_cpu_mem_usage, "is_trainable": is_trainable}
    loaded = PeftModel.from_pretrained(make_model(), path, **kwargs).eval()
    assert torch.equal(logits(loaded, tokens), expected)
    assert any(p.requires_grad for p in loaded.parameters()) == is_trainable
    loaded.load_adapter(path, "other", **kwargs)
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded, tokens), expected)


def test_file_holds_factors_and_blocks(folder, make_model):
    path, _ = folder
    state = load_file(path / WEIGHTS)
    assert {key.rsplit(".", 1)[1] for key in state} == {"smoa_A", "smoa_B", "smoa_blocks"}
    assert json.loads((path / "adapter_config.json").read_text())["format_version"] == 2
    for name, layer in layers(adapt(make_model())).items():
        partition, ranks, sketch = unpack_blocks(
            state[f"{name}.smoa_blocks"], layer.out_features, layer.in_features
        )
        assert partition == layer.partition("default")
        assert ranks.tolist() == [2, 2, 1]
        torch.testing.assert_close(sketch, sketch_weight(layer.base_weight()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 7, 8, 256, 300])
def test_packed_blocks_round_trip(num_blocks):
    labels = torch.arange(640).remainder(num_blocks)[torch.randperm(640)]
    partition = BlockPartition.from_labels(labels[:317], labels[317:], num_blocks)
    ranks, sketch = torch.arange(num_blocks, dtype=torch.int32), torch.randn(33).half().float()
    packed = pack_blocks(partition, ranks, sketch)
    bits = (num_blocks - 1).bit_length()
    assert len(packed) == blocks_size(317, 323, num_blocks) == 8 + 4 * num_blocks + 66 + 80 * bits
    found = unpack_blocks(packed, 317, 323)
    assert found.partition == partition
    assert torch.equal(found.ranks, ranks)
    assert torch.equal(found.sketch, sketch)


@pytest.mark.numerical
def test_configuration_without_weights_starts_a_new_adapter(folder, make_model, tokens):
    path, _ = folder
    config = SMoAConfig.from_pretrained(path)
    config.inference_mode = False
    model = get_peft_model(make_model(), config).train()
    logits(model, tokens).sum().backward()
    for layer in layers(model).values():
        assert layer.partition("default") == BlockPartition.from_weight(layer.base_weight(), 3)
        assert layer.smoa_A["default"].grad is not None


# Merging


@pytest.mark.numerical
def test_merging_keeps_the_outputs_and_unmerging_restores_every_bit(make_model, tokens):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = adapt(make_model().to(dtype))
        nudge(model)
        before = {name: layer.base_layer.weight.clone() for name, layer in layers(model).items()}
        expected = logits(model, tokens).float()
        model.merge_adapter(safe_merge=True)
        tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
        scale = expected.abs().max().item()
        torch.testing.assert_close(logits(model, tokens).float(), expected, rtol=0, atol=tolerance * scale)
        model.unmerge_adapter()
        for name, layer in layers(model).items():
            assert torch.equal(layer.base_layer.weight, before[name])


@pytest.mark.numerical
def test_safe_merge_refuses_a_broken_adapter_before_it_writes(llama, monkeypatch):
    model = adapt(llama())
    layer = next(iter(layers(model).values()))
    weight = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.smoa_B["default"].fill_(torch.nan)
    monkeypatch.delattr(BaseWeight, "_write")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)


@pytest.mark.numerical
def test_state_dict_of_the_whole_model(make_model, tokens):
    source, target = adapt(make_model()), adapt(make_model(seed=1))
    nudge(source)
    logits(target, tokens)  # its index tensors exist before the other labels arrive
    target.load_state_dict(source.state_dict())
    assert torch.equal(logits(target, tokens), logits(source, tokens))
    state = source.state_dict()
    key = next(key for key in state if "smoa_blocks" in key)
    state[key] = state[key] ^ 1
    with pytest.raises(ValueError, match=f"{key.split('.smoa')[0]}: smoa_blocks"):
        target.load_state_dict(state)
