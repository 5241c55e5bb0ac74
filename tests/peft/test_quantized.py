"""Adapters over a quantised base (bitsandbytes, torchao or transformers' FP8): results and life cycle."""

import pytest
import torch
from adapted import layer_list
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from peft.utils.quantization_utils import Bnb8bitBackend
from quantized_bases import EACH, KINDS, SLOW, adapt, float8, float8_layer, four_bits, load, torchao
from test_faults import FailingAt, count
from torch import nn
from torch_calls import Largest, saved_tensors
from transformers import AutoModelForCausalLM, TorchAoConfig
from transformers.integrations.finegrained_fp8 import FP8GroupedLinear

from smoa_kernels import smoa_linear
from smoa_kernels.definition.block_rule import BlockRule
from smoa_kernels.peft import SMoAConfig, dequantize


@pytest.fixture
def nf4(quantizable):
    return adapt(load(quantizable, KINDS["nf4"])).train()


# A layer's results


OTHER_ORDERS = [("nf4", {"block_order": "contiguous"}), ("torchao int8", {"granule": 8})]


@pytest.mark.parametrize(
    ("kind", "order"), [*(pytest.param(*p.values, {}, marks=p.marks) for p in EACH), *OTHER_ORDERS]
)
def test_outputs_and_gradients_are_those_over_the_dequantised_weight(quantizable, kind, order):
    model = adapt(load(quantizable, KINDS[kind]), smoa_dropout=0.4, **order).train()
    for layer in layer_list(model):
        assert layer.smoa_A["default"].dtype == torch.float32
        weight, partition = layer.base_weight().float(), layer.partition("default")
        assert partition == BlockRule(2, **order).build(weight)
        x = torch.randn(7, layer.in_features, requires_grad=True)
        dy = torch.randn(7, layer.out_features)
        torch.manual_seed(1)
        y = layer(x)
        y.backward(dy)
        ours = [x, layer.smoa_A["default"], layer.smoa_B["default"]]
        theirs = [t.detach().clone().requires_grad_() for t in ours]
        settings = {"scaling": layer.scaling["default"], "dropout_p": 0.4}
        torch.manual_seed(1)
        expected = smoa_linear(
            theirs[0], weight, None, *theirs[1:], partition, layer.ranks("default"), **settings
        )
        expected.backward(dy)
        torch.testing.assert_close(y, expected)
        for mine, reference in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.grad, reference.grad)


def test_the_weights_values_are_not_kept_for_backward(quantizable):
    """A second adapter with another dropout uses a dense product; backward recomputes it."""
    model = adapt(load(quantizable, KINDS["nf4"]), smoa_dropout=0.5)
    model.add_adapter("other", SMoAConfig(r=3, target_modules="all-linear", init_weights=False))
    layer = layer_list(model.train())[0]
    x, dy = torch.randn(5, layer.in_features), torch.randn(5, layer.out_features)
    with saved_tensors() as saved:
        layer(x)
        model.base_model.set_adapter(["default", "other"])
        y = layer(x)
    assert (layer.out_features, layer.in_features) not in {tuple(t.shape) for t in saved}
    y.backward(dy)
    found = [factor["other"].grad.clone() for factor in (layer.smoa_A, layer.smoa_B)]
    model.zero_grad()
    model.base_model.set_adapter("other")
    layer(x).backward(dy)
    for gradient, factor in zip(found, (layer.smoa_A, layer.smoa_B), strict=True):
        torch.testing.assert_close(gradient, factor["other"].grad)


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


def test_second_derivatives_are_refused(nf4):
    layer = layer_list(nf4)[0]
    x = torch.randn(5, layer.in_features, requires_grad=True)
    with pytest.raises(RuntimeError, match="second derivatives over a quantised base weight"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


def test_active_adapters_add_up(nf4):
    nf4.add_adapter("other", SMoAConfig(r=6, num_blocks=3, target_modules="all-linear", init_weights=False))
    nf4.base_model.set_adapter(["default", "other"])
    layer = layer_list(nf4.eval())[0]
    x = torch.randn(4, layer.in_features)
    delta = layer.get_delta_weight("default") + layer.get_delta_weight("other")
    expected = nn.functional.linear(x, layer.base_weight() + delta)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


# The life cycle of an adapter

# torchao's tile-packed 4-bit kernel needs a GPU.
TILE_PACKED = TorchAoConfig(
    torchao.Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d")
)
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def anatomy(layer):
    """The tensors of a quantised layer: the bytes of each, and the attributes that hold them."""
    weight = layer.weight
    found = {"attributes": sorted(vars(layer)), "of the weight": sorted(vars(weight)), "kind": type(weight)}
    for name in ("data", "qdata", "scale", "SCB"):
        value = getattr(weight, name, None)
        if isinstance(value, torch.Tensor) and type(value) in (torch.Tensor, nn.Parameter):
            found[name] = value.contiguous().view(torch.uint8).cpu().numpy().tobytes()
    return found


@pytest.mark.parametrize(
    ("config", "dtype", "tolerance", "rounding"),
    [
        pytest.param(KINDS["nf4"], torch.float32, 0.02, 0.3, id="nf4"),
        pytest.param(
            four_bits("nf4", compute=torch.bfloat16),
            torch.float32,
            0.02,
            0.3,
            id="nf4 in bf16",
            marks=SLOW,
        ),
        # bitsandbytes' own GEMM also rounds x to int8; ours does not.
        pytest.param(KINDS["int8"], torch.float32, 0.03, 0.03, id="int8", marks=SLOW),
        pytest.param(KINDS["torchao int8"], torch.float32, 1e-5, 0.03, id="torchao int8"),
        pytest.param(KINDS["torchao int4"], torch.float32, 1e-5, 0.5, id="torchao int4", marks=SLOW),
        pytest.param(KINDS["torchao float8"], torch.float32, 1e-5, 0.1, id="torchao float8", marks=SLOW),
        pytest.param(KINDS["torchao nvfp4"], torch.float32, 1e-5, 0.5, id="torchao nvfp4", marks=SLOW),
        pytest.param(KINDS["torchao int4"], torch.bfloat16, 0.02, 0.5, id="torchao int4, bf16", marks=SLOW),
        pytest.param(TILE_PACKED, torch.bfloat16, 0.02, 0.5, id="torchao int4 on a GPU", marks=ON_GPU),
    ],
)
def test_life_cycle(quantizable, tokens, config, dtype, tolerance, rounding):
    """A fresh adapter changes little, trains, merges by requantising, and unmerges exactly."""
    device = "cuda" if config is TILE_PACKED else "cpu"
    base, tokens = load(quantizable, config, dtype, device), tokens.to(device)
    expected = base(tokens).logits  # on some CPUs this repacks bitsandbytes' weights
    model = adapt(base, init_weights=True, smoa_alpha=8).eval()
    assert (model(tokens).logits - expected).norm() <= tolerance * expected.norm()
    model(tokens).logits.sum().backward()
    with torch.no_grad():
        for layer in layer_list(model):
            assert layer.smoa_B["default"].grad.any()
            layer.smoa_B["default"].normal_()
    adapted, keys = model(tokens).logits, get_peft_model_state_dict(model).keys()
    bases = [anatomy(layer.base_layer) for layer in layer_list(model)]
    model.merge_adapter()
    merged = model(tokens).logits
    assert (merged - adapted).norm() < rounding * adapted.norm()
    assert get_peft_model_state_dict(model).keys() == keys
    model.unmerge_adapter()
    for layer, before in zip(layer_list(model), bases, strict=True):
        assert anatomy(layer.base_layer) == before
    assert torch.equal(model(tokens).logits, adapted)
    assert torch.equal(model.merge_and_unload()(tokens).logits, merged)


@pytest.mark.parametrize("block", [None, (48, 32), (128, 128)])
def test_float8_blocks_are_read_as_they_were_scaled(block):
    model = adapt(nn.Sequential(float8_layer(nn.Linear(72, 200), block)), target_modules=["0"])
    (layer,) = layer_list(model)
    assert torch.equal(layer.base_weight(), layer.base_layer.wanted)
    assert layer.smoa_A["default"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["int8", "fp8", "torchao int4"])
def test_a_weight_is_read_a_few_rows_at_a_time(quantizable, kind, monkeypatch):
    layers, most, fill = layer_list(adapt(load(quantizable, KINDS[kind]))), [], dequantize._filled
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
    model = adapt(load(quantizable, float8))
    layer = layer_list(model)[0]
    x = torch.randn(3, layer.in_features)
    before, y = anatomy(layer.base_layer), layer(x)
    with pytest.raises(TypeError, match=r"FP8Linear layer takes no merged weight.*dequantize=True"):
        layer.merge()
    assert anatomy(layer.base_layer) == before
    assert not layer.merged
    assert torch.equal(layer(x), y)


def test_other_weights_of_eight_bits_are_refused():
    layer = float8_layer(nn.Linear(64, 32), None)
    layer.weight = nn.Parameter(
        torch.zeros(32, 32, dtype=torch.int8), requires_grad=False
    )  # FP4, two values in a byte
    for kind in (layer, FP8GroupedLinear(8, 32, 2)):
        with pytest.raises(ValueError, match=rf"weight of {type(kind).__name__} is torch.*dequantize=True"):
            adapt(nn.Sequential(kind), target_modules=["0"])


def test_an_adapter_fits_the_base_without_quantisation(quantizable, nf4, tokens, tmp_path):
    expected = nf4.eval()(tokens).logits
    nf4.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(quantizable, dtype=torch.float32)
    over_plain = PeftModel.from_pretrained(plain, tmp_path, strict_base=True).eval()
    assert (over_plain(tokens).logits - expected).norm() < 0.3 * expected.norm()


@SLOW
@pytest.mark.parametrize("kind", ["nf4, double", "int8", "torchao int8"])
def test_a_merge_that_is_interrupted_anywhere(quantizable, kind):
    """The base is restored at whatever point PEFT was interrupted; after a first merge, it keeps that merge."""
    one_layer = {"target_modules": ["q_proj"], "layers_to_transform": [0], "init_weights": False}
    model = adapt(load(quantizable, KINDS[kind]), smoa_alpha=8, **one_layer)
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
            base, whole = layer.base_layer, anatomy(layer.base_layer)
            with pytest.raises(KeyboardInterrupt), FailingAt(n, KeyboardInterrupt):
                layer.merge(adapter_names=first)
            assert layer.base_layer is base  # which others may refer to, and which may have hooks
            assert anatomy(base) == whole
            assert torch.equal(layer(x), wanted), n
            assert layer.merged == (first == ["other"])
        if first == ["default"]:
            layer.merge(adapter_names=first)
            assert torch.equal(layer(x), merged)
    layer.unmerge()
    assert torch.equal(layer(x), expected)
