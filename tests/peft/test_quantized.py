"""Adapters over a quantised base (bitsandbytes, torchao or transformers' FP8): results and life cycle."""

import pytest
import torch
from adapted import adapt, anatomy, layer_list
from peft import PeftModel
from peft.utils.quantization_utils import Bnb8bitBackend
from problems import relative_error
from quantized_bases import float8_layer, load
from test_faults import FailingAt, count
from torch import nn
from torch_calls import Largest, saved_tensors
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import FP8GroupedLinear

from smoa_kernels.peft import SMoAConfig, dequantize


@pytest.fixture
def nf4(quantizable):
    return adapt(load(quantizable, "nf4"), smoa_alpha=0.5).train()


def test_the_weights_values_are_not_kept_for_backward(quantizable):
    """A second adapter with another dropout uses a dense product; backward recomputes it."""
    model = adapt(load(quantizable, "nf4"), smoa_dropout=0.5)
    model.add_adapter("other", SMoAConfig(r=3, target_modules="all-linear", init_weights=False))
    layer = layer_list(model.train())[0]
    x, dy = torch.randn(5, layer.in_features), torch.randn(5, layer.out_features)
    with saved_tensors() as saved:
        layer(x)
        model.base_model.set_adapter(["default", "other"])
        y = layer(x)
    assert (layer.out_features, layer.in_features) not in {tuple(t.shape) for t in saved}
    y.backward(dy)
    found = [factor.grad.clone() for factor in layer.smoa["other"].parameters()]
    model.zero_grad()
    model.base_model.set_adapter("other")
    layer(x).backward(dy)
    for gradient, factor in zip(found, layer.smoa["other"].parameters(), strict=True):
        torch.testing.assert_close(gradient, factor.grad)


def test_a_backward_after_inference_checkpointing_or_a_merge_uses_the_base_weight(nf4, tokens):
    def gradients(before_backward=lambda: None):
        torch.manual_seed(1)
        nf4.zero_grad()
        loss = nf4(tokens).logits.square().sum()
        before_backward()
        loss.backward()
        return {name: p.grad.clone() for name, p in nf4.named_parameters() if p.requires_grad}

    with torch.inference_mode():
        nf4(tokens)
    expected = gradients()
    nf4.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    recomputed = gradients()
    nf4.gradient_checkpointing_disable()
    over_merged = gradients(nf4.merge_adapter)
    for name, gradient in expected.items():
        torch.testing.assert_close(recomputed[name], gradient)
        torch.testing.assert_close(over_merged[name], gradient)


@pytest.mark.parametrize(("kind", "least", "most"), [("nf4", 0, 1e-5), ("torchao int8", 1e-4, 2e-2)])
def test_autocast_chooses_the_dtype_of_a_layer_without_a_compute_dtype(quantizable, kind, least, most):
    layer = layer_list(adapt(load(quantizable, kind)))[0]
    x = torch.randn(5, layer.in_features)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert least <= relative_error(layer(x), expected) <= most


def test_one_token_of_one_dimension_trains_a_bias(nf4):
    layer = next(layer for layer in layer_list(nf4) if layer.base_layer.bias is not None)
    bias, x = layer.base_layer.bias.requires_grad_(), torch.randn(layer.in_features)
    expected = torch.autograd.grad(layer(x[None]).sin().sum(), bias)
    assert torch.equal(*torch.autograd.grad(layer(x).sin().sum(), bias), *expected)


def test_x_is_kept_for_the_factors_gradients_alone(nf4):
    layer = layer_list(nf4)[0]
    x = torch.randn(5, layer.in_features, requires_grad=True)
    for trained in (True, False):
        layer.set_requires_grad("default", trained)
        with saved_tensors() as saved:
            layer(x)
        assert (x.data_ptr() in {t.data_ptr() for t in saved}) == trained


def test_second_derivatives_are_refused(nf4):
    layer = layer_list(nf4)[0]
    x = torch.randn(5, layer.in_features, requires_grad=True)
    with pytest.raises(RuntimeError, match="second derivatives over a quantised base weight"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("block", [None, (48, 32), (128, 128)])
def test_float8_blocks_are_read_as_they_were_scaled(block):
    model = adapt(nn.Sequential(float8_layer(nn.Linear(72, 200), block)), target_modules=["0"])
    (layer,) = layer_list(model)
    assert torch.equal(layer.base_weight(), layer.base_layer.wanted)
    assert layer.smoa["default"].A.dtype == torch.float32


@pytest.mark.parametrize("kind", ["int8", "fp8", "torchao int4"])
def test_a_weight_is_read_a_few_rows_at_a_time(quantizable, kind, monkeypatch):
    layers, most, fill = layer_list(adapt(load(quantizable, kind))), [], dequantize._filled
    whole = [layer.base_weight() for layer in layers]
    panel = 700
    monkeypatch.setattr(dequantize, "_PANEL_ELEMENTS", {"cpu": panel})

    def watched(out, rows):
        with Largest(out.data_ptr()) as largest:
            found = fill(out, rows)
        most.append(largest.elements)
        return found

    monkeypatch.setattr(dequantize, "_filled", watched)
    for layer, expected in zip(layers, whole, strict=True):
        assert torch.equal(layer.base_weight(), expected)
        assert torch.equal(layer._dequantize(torch.bfloat16), expected.bfloat16())
        if kind == "int8":
            assert torch.equal(expected, Bnb8bitBackend().get_base_weight(layer.base_layer))
    assert len(most) == 2 * len(layers)
    assert 0 < max(most) <= 2 * panel  # of the packing, as many rows of the identity


def test_float8_takes_no_merged_weight(quantizable):
    model = adapt(load(quantizable, "fp8"))
    layer = layer_list(model)[0]
    x = torch.randn(3, layer.in_features)
    before, y = anatomy(layer), layer(x)
    with pytest.raises(TypeError, match=r"FP8Linear layer takes no merged weight.*dequantize=True"):
        layer.merge()
    assert anatomy(layer) == before
    assert not layer.merged
    assert torch.equal(layer(x), y)


def test_other_weights_of_eight_bits_are_refused():
    layer = float8_layer(nn.Linear(64, 32), None)
    # FP4, two values in a byte
    layer.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    for kind in (layer, FP8GroupedLinear(8, 32, 2)):
        with pytest.raises(ValueError, match=rf"weight of {type(kind).__name__} is torch.*dequantize=True"):
            adapt(nn.Sequential(kind), target_modules=["0"])


def test_packed_weights_are_refused_by_name():
    """As compressed-tensors and GPTQ hold them."""
    for name in ("weight_packed", "qweight"):
        layer = nn.Linear(64, 32)
        del layer.weight
        layer.register_buffer(name, torch.zeros(32, 8, dtype=torch.int32))
        with pytest.raises(
            ValueError, match=f"weight of Linear is {name}, which.*dequantize=True, or the model"
        ):
            adapt(nn.Sequential(layer), target_modules=["0"])


def test_an_adapter_fits_the_base_without_quantisation(quantizable, nf4, tokens, tmp_path):
    expected = nf4.eval()(tokens).logits
    nf4.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(quantizable, dtype=torch.float32)
    over_plain = PeftModel.from_pretrained(plain, tmp_path, strict_base=True).eval()
    assert (over_plain(tokens).logits - expected).norm() < 0.3 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4, double", "int8", "torchao int8"])
def test_a_merge_that_is_interrupted_anywhere(quantizable, kind):
    """The base is restored at whatever point PEFT was interrupted; after a first merge, it keeps that merge."""
    one_layer = {"target_modules": ["q_proj"], "layers_to_transform": [0], "init_weights": False}
    model = adapt(load(quantizable, kind), smoa_alpha=8, **one_layer)
    model.add_adapter("other", SMoAConfig(r=4, **one_layer))
    (layer,) = layer_list(model)
    x = torch.randn(5, layer.in_features)
    expected = layer(x)
    calls = count(lambda: layer.merge(adapter_names=["default"]))
    merged = layer(x)
    layer.unmerge()
    assert calls > 5
    for first, wanted in ((["default"], expected), (["other"], merged)):
        for n in range(1, calls + 1):
            base, whole = layer.base_layer, anatomy(layer)
            with pytest.raises(KeyboardInterrupt), FailingAt(n, KeyboardInterrupt):
                layer.merge(adapter_names=first)
            assert layer.base_layer is base  # which others may refer to, and which may have hooks
            assert anatomy(layer) == whole
            assert torch.equal(layer(x), wanted), n
            assert layer.merged == (first == ["other"])
        if first == ["default"]:
            layer.merge(adapter_names=first)
            assert torch.equal(layer(x), merged)
    layer.unmerge()
    assert torch.equal(layer(x), expected)
