"""Base weights that accelerate offloads to the CPU or to disk, or that DeepSpeed partitions."""

import tempfile
import warnings
from contextlib import contextmanager

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from adapted import adapt, layer_list
from peft import PeftModel
from tiny_models import tiny_gpt2, tiny_llama


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


def test_injection_reads_the_offloaded_weight(offload, tokens, expected):
    model = adapt(offload(tiny_llama()))
    for layer in layer_list(model):
        assert (layer.base_layer.weight.is_meta, layer.smoa["default"].A.is_meta) == (True, False)
    assert torch.equal(model(tokens).logits, expected)
    plain = adapt(tiny_llama())
    model(tokens).logits.square().sum().backward()
    plain(tokens).logits.square().sum().backward()
    for ours, reference in zip(layer_list(model), layer_list(plain), strict=True):
        assert torch.equal(ours.smoa["default"].B.grad, reference.smoa["default"].B.grad)
    torch.testing.assert_close(model.merge_and_unload()(tokens).logits, expected)


def test_loading_over_an_offloaded_model(offload, tokens, expected, tmp_path):
    model = PeftModel.from_pretrained(offload(tiny_llama()), tmp_path / "adapter").eval()
    assert torch.equal(model(tokens).logits, expected)
    with pytest.raises(ValueError, match="another base weight"):
        PeftModel.from_pretrained(offload(tiny_llama(seed=1)), tmp_path / "adapter", strict_base=True)


def test_combining_adapters_over_an_offloaded_model(offload, tokens, tmp_path):
    """W0 is not read: a quantised model would dequantise every layer and keep all of them."""

    def outputs(base):
        model = adapt(base)
        model.add_weighted_adapter(["default"], [0.5], "scaled")
        model.add_weighted_adapter(["default", "scaled"], [1.0, -1.0], "sum")
        model.set_adapter("sum")
        model.save_pretrained(tmp_path / "adapters")
        return model(tokens).logits, (tmp_path / "adapters/sum/adapter_model.safetensors").read_bytes()

    expected, file = outputs(tiny_llama())
    found, found_file = outputs(offload(tiny_llama()))
    assert torch.equal(found, expected)
    assert found_file == file


def test_offloading_an_adapted_model(offload, tokens, expected, tmp_path):
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    offload(model.base_model.model)
    assert torch.equal(model(tokens).logits, expected)
    with pytest.raises(RuntimeError, match="the base weight is offloaded"):
        layer_list(model)[0].merge()
    trained = adapt(tiny_llama())
    offload(trained.base_model.model)
    with pytest.raises(RuntimeError, match="the adapter's weights are offloaded and cannot be trained"):
        trained(tokens)


@pytest.fixture
def zero3(monkeypatch):
    """A function that empties a model's weights as ZeRO-3 does; PEFT's gathering context restores them."""
    whole = {}

    def partition(model):
        for parameter in model.parameters():
            parameter.ds_id, whole[parameter] = len(whole), parameter.data
            parameter.data = parameter.data.new_empty(0)
        return model

    @contextmanager
    def gather(parameters, modifier_rank):
        assert modifier_rank is None  # for reading, not for writing
        given = [parameter for parameter in parameters if parameter in whole]
        for parameter in given:
            parameter.data = whole[parameter]
        yield
        for parameter in given:
            parameter.data = parameter.data.new_empty(0)

    monkeypatch.setattr("smoa_kernels.peft.offload.gather_params_ctx", gather)
    return partition


@pytest.mark.parametrize("make_base", [tiny_llama, tiny_gpt2])
def test_injection_gathers_a_partitioned_weight(zero3, make_base, tmp_path):
    plain, partitioned = adapt(make_base()), adapt(zero3(make_base()))
    for ours, reference in zip(layer_list(partitioned), layer_list(plain), strict=True):
        assert ours.base_layer.weight.numel() == 0
        assert torch.equal(ours.smoa["default"].row_block, reference.smoa["default"].row_block)
    # Loading an adapter gathers the base weight too, to recognise it.
    plain.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(zero3(make_base()), tmp_path, strict_base=True)
    with pytest.raises(ValueError, match="another base weight"):
        PeftModel.from_pretrained(zero3(make_base(seed=1)), tmp_path, strict_base=True)
    with pytest.raises(RuntimeError, match="W0 is partitioned by DeepSpeed ZeRO-3"):
        layer_list(partitioned)[0](torch.randn(2, layer_list(partitioned)[0].in_features))


def test_deepspeeds_own_checkpoint_is_loaded(zero3):
    """Its states have whole labels and, of partitioned factors, placeholders without elements."""
    saved, fresh = (zero3(adapt(tiny_llama(), block_order=order)) for order in ("random", "contiguous"))
    fresh.load_state_dict(saved.state_dict())
    for ours, theirs in zip(layer_list(fresh), layer_list(saved), strict=True):
        assert ours.partition("default") == theirs.partition("default")
