"""Base weights that accelerate offloads to the CPU or to disk, or that DeepSpeed partitions."""

import tempfile

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import PeftModel, get_peft_model
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

from smoa_kernels.peft import SMoAConfig, SMoALayer


def adapt(model, seed=0):
    torch.manual_seed(seed)
    return get_peft_model(model, SMoAConfig(r=4, target_modules="all-linear", init_weights=False)).eval()


@pytest.fixture(params=["cpu", "disk"])
def offload(request, tmp_path):
    """A function that offloads a whole model; it still computes on the CPU."""

    def apply(model):
        device = torch.device("cpu")
        if request.param == "cpu":
            return cpu_offload(model, execution_device=device)
        return disk_offload(model, tempfile.mkdtemp(dir=tmp_path), execution_device=device)

    return apply


@pytest.fixture
def expected(tokens, tmp_path):
    model = adapt(tiny_llama())
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        return model(tokens).logits


def layers(model):
    return [module for module in model.modules() if isinstance(module, SMoALayer)]


def test_injection_reads_the_offloaded_weight(offload, tokens, expected):
    model = adapt(offload(tiny_llama()))
    assert all(
        layer.base_layer.weight.is_meta and not layer.smoa_A["default"].is_meta for layer in layers(model)
    )
    assert torch.equal(model(tokens).logits, expected)
    plain = adapt(tiny_llama())
    model(tokens).logits.square().sum().backward()
    plain(tokens).logits.square().sum().backward()
    for ours, theirs in zip(layers(model), layers(plain), strict=True):
        assert torch.equal(ours.smoa_B["default"].grad, theirs.smoa_B["default"].grad)
    torch.testing.assert_close(model.merge_and_unload()(tokens).logits, expected)


def test_loading_over_an_offloaded_model(offload, tokens, expected, tmp_path):
    model = PeftModel.from_pretrained(offload(tiny_llama()), tmp_path / "adapter").eval()
    assert torch.equal(model(tokens).logits, expected)
    with pytest.raises(ValueError, match="another base weight"):
        PeftModel.from_pretrained(offload(tiny_llama(seed=1)), tmp_path / "adapter", strict_base=True)


def test_offloading_an_adapted_model(offload, tokens, expected, tmp_path):
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    offload(model.base_model.model)
    assert torch.equal(model(tokens).logits, expected)
    with pytest.raises(RuntimeError, match="the base weight is offloaded"):
        layers(model)[0].merge()
    trained = adapt(tiny_llama())
    offload(trained.base_model.model)
    with pytest.raises(RuntimeError, match="the adapter's weights are offloaded and cannot be trained"):
        trained(tokens)


def test_device_map_of_transformers(tokens, expected, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
    device_map = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=device_map, offload_folder=tmp_path / "offload", dtype=torch.float32
    )
    assert any(parameter.is_meta for parameter in base.parameters())
    model = adapt(base)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected)


def test_partitioned_weight_is_an_error():
    model = adapt(tiny_llama())
    layer = layers(model)[0]
    layer.base_layer.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    layer.base_layer.weight.ds_id = 7
    with pytest.raises(RuntimeError, match="W0 is partitioned by DeepSpeed ZeRO-3"):
        layer(torch.randn(2, layer.in_features))
