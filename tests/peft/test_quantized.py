"""A quantised base on the CPU: bitsandbytes' NF4, FP4 and int8, torchao's int8 weight-only."""

import pytest
import torch
from adapted import layer_list
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils import get_peft_model_state_dict
from test_faults import FailingAt, count
from tiny_models import tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from smoa_kernels import BlockPartition, smoa_linear
from smoa_kernels.peft import SMoAConfig

bnb = pytest.importorskip("bitsandbytes", reason="the extra of quantised bases is not installed")

KINDS = [("nf4", False), ("nf4", True), ("fp4", False)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


def load(folder, kind="nf4", double=False, compute=torch.float32):
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    ).eval()


def adapt(model, **settings):
    defaults = {
        "r": 4,
        "num_blocks": 2,
        "target_modules": "all-linear",
        "init_weights": False,
        "smoa_alpha": 0.5,
    }
    return get_peft_model(model, SMoAConfig(**{**defaults, **settings}))


def dequantized(layer):
    return bnb.functional.dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state)


@pytest.mark.parametrize(("kind", "double"), KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_outputs_and_gradients_are_those_over_the_dequantised_weight(saved, kind, double, dropout):
    model = adapt(load(saved, kind, double), smoa_dropout=dropout).train()
    for layer in layer_list(model):
        assert isinstance(layer.base_layer, bnb.nn.Linear4bit)
        assert layer.smoa_A["default"].dtype == torch.float32
        weight = dequantized(layer).float()
        partition = layer.partition("default")
        assert partition == BlockPartition.from_weight(weight, 2)
        x = torch.randn(7, layer.in_features, requires_grad=True)
        dy = torch.randn(7, layer.out_features)
        torch.manual_seed(1)
        y = layer(x)
        y.backward(dy)
        ours = [x.grad, layer.smoa_A["default"].grad, layer.smoa_B["default"].grad]
        theirs = [
            t.detach().clone().requires_grad_() for t in (x, layer.smoa_A["default"], layer.smoa_B["default"])
        ]
        torch.manual_seed(1)
        expected = smoa_linear(
            theirs[0],
            weight,
            None,
            *theirs[1:],
            partition,
            layer.ranks("default"),
            scaling=layer.scaling["default"],
            dropout_p=dropout,
        )
        expected.backward(dy)
        torch.testing.assert_close(y, expected)
        for gradient, reference in zip(ours, theirs, strict=True):
            torch.testing.assert_close(gradient, reference.grad)


def test_the_weights_values_are_not_kept_for_backward(saved):
    model = adapt(load(saved)).train()
    layer = layer_list(model)[0]
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        layer(torch.randn(5, layer.in_features))
    assert (layer.out_features, layer.in_features) not in shapes


def test_nor_where_adapters_drop_out_differently(saved):
    """The second one's product is a dense one, recomputed in backward."""
    model = adapt(load(saved), smoa_dropout=0.5)
    model.add_adapter("other", SMoAConfig(r=3, target_modules="all-linear", init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    layer = layer_list(model.train())[0]
    x, dy, shapes = torch.randn(5, layer.in_features), torch.randn(5, layer.out_features), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        y = layer(x)
    assert (layer.out_features, layer.in_features) not in shapes
    y.backward(dy)
    found = [factor["other"].grad.clone() for factor in (layer.smoa_A, layer.smoa_B)]
    model.zero_grad()
    model.base_model.set_adapter("other")
    layer(x).backward(dy)
    for gradient, factor in zip(found, (layer.smoa_A, layer.smoa_B), strict=True):
        torch.testing.assert_close(gradient, factor["other"].grad)


def test_training_over_a_prepared_model(saved, tokens):
    model = adapt(prepare_model_for_kbit_training(load(saved)), init_weights=True, smoa_alpha=4).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    first = None
    for _ in range(8):
        loss = model(tokens, labels=tokens).loss
        first = loss.item() if first is None else first
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < first


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_merging_requantises_and_unmerging_restores_every_bit(saved, tokens, compute):
    model = adapt(load(saved, compute=compute), smoa_alpha=8).eval()
    expected = model(tokens).logits
    before = [layer.base_layer.weight.data.clone() for layer in layer_list(model)]
    saved_before = get_peft_model_state_dict(model)
    model.merge_adapter()
    merged = model(tokens).logits
    assert (merged - expected).norm() < 0.3 * expected.norm()  # the rounding of NF4
    assert get_peft_model_state_dict(model).keys() == saved_before.keys()
    for layer, packed in zip(layer_list(model), before, strict=True):
        assert not torch.equal(layer.base_layer.weight.data, packed)
    model.unmerge_adapter()
    for layer, packed in zip(layer_list(model), before, strict=True):
        assert torch.equal(layer.base_layer.weight.data, packed)
    assert torch.equal(model(tokens).logits, expected)
    unloaded = model.merge_and_unload()
    assert torch.equal(unloaded(tokens).logits, merged)


def test_adapters_move_between_a_base_and_its_quantised_form(saved, tokens, tmp_path, recwarn):
    model = adapt(load(saved)).eval()
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(saved), tmp_path, strict_base=True).eval()
    assert torch.equal(again(tokens).logits, expected)
    plain = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    over_plain = PeftModel.from_pretrained(plain, tmp_path, strict_base=True).eval()
    assert (over_plain(tokens).logits - expected).norm() < 0.3 * expected.norm()
    assert not [w for w in recwarn if "another base weight" in str(w.message)]


def test_a_base_that_was_evaluated_before(saved, tokens):
    base = load(saved)
    expected = base(tokens).logits  # on some CPUs this packs the weights anew
    model = adapt(base, init_weights=True).eval()
    assert (model(tokens).logits - expected).norm() < 0.02 * expected.norm()


def test_several_adapters_and_mixed_batches(saved, tokens):
    model = adapt(load(saved))
    model.add_adapter("other", SMoAConfig(r=6, num_blocks=3, target_modules="all-linear", init_weights=False))
    model.eval()
    default = model(tokens).logits
    model.base_model.set_adapter("other")
    other = model(tokens).logits
    with model.disable_adapter():
        base = model(tokens).logits
    mixed = model(tokens, adapter_names=["default", "other", "__base__"]).logits
    for i, expected in enumerate((default, other, base)):
        torch.testing.assert_close(mixed[i], expected[i], rtol=1e-4, atol=1e-4)
    model.base_model.set_adapter(["default", "other"])
    layer = layer_list(model)[0]
    x = torch.randn(4, layer.in_features)
    delta = layer.get_delta_weight("default") + layer.get_delta_weight("other")
    torch.testing.assert_close(
        layer(x), nn.functional.linear(x, dequantized(layer) + delta), rtol=1e-4, atol=1e-5
    )


def test_eight_bits(saved, tokens):
    config = BitsAndBytesConfig(load_in_8bit=True)
    base = AutoModelForCausalLM.from_pretrained(saved, quantization_config=config, dtype=torch.float32).eval()
    expected = base(tokens).logits
    model = adapt(base, init_weights=True, smoa_alpha=8)
    # Its own product rounds x to int8 as well, ours does not.
    assert (model.eval()(tokens).logits - expected).norm() < 0.03 * expected.norm()
    model.train()(tokens).logits.sum().backward()
    with torch.no_grad():
        for layer in layer_list(model):
            assert isinstance(layer.base_layer, bnb.nn.Linear8bitLt)
            assert layer.smoa_B["default"].grad.any()
            layer.smoa_B["default"].normal_()
    adapted = model.eval()(tokens).logits
    before = [(layer.base_layer.weight.data.clone(), layer.base_weight()) for layer in layer_list(model)]
    model.merge_adapter()
    merged = model(tokens).logits
    assert (merged - adapted).norm() < 0.03 * adapted.norm()
    model.unmerge_adapter()
    for layer, (packed, weight) in zip(layer_list(model), before, strict=True):
        assert torch.equal(layer.base_layer.weight.data, packed)
        assert torch.equal(layer.base_weight(), weight)
    assert torch.equal(model(tokens).logits, adapted)
    assert torch.equal(model.merge_and_unload()(tokens).logits, merged)


def torchao_base(folder, config, device="cpu", dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=TorchAoConfig(config), dtype=dtype, device_map=device
    ).eval()


def check_torchao_life_cycle(base, tokens, tolerance, rounding):
    """A fresh adapter changes little, trains, merges by requantising, and unmerges exactly."""
    expected = base(tokens).logits
    model = adapt(base, init_weights=True, smoa_alpha=8).eval()
    assert (model(tokens).logits - expected).norm() <= tolerance * expected.norm()
    model(tokens).logits.sum().backward()
    with torch.no_grad():
        for layer in layer_list(model):
            assert layer.smoa_B["default"].grad.any()
            layer.smoa_B["default"].normal_()
    adapted = model(tokens).logits
    weights = [layer.base_weight() for layer in layer_list(model)]
    model.merge_adapter()
    merged = model(tokens).logits
    assert (merged - adapted).norm() < rounding * adapted.norm()
    model.unmerge_adapter()
    assert all(
        torch.equal(layer.base_weight(), w) for layer, w in zip(layer_list(model), weights, strict=True)
    )
    assert torch.equal(model.merge_and_unload()(tokens).logits, merged)


def test_torchao_int8_weight_only(saved, tokens):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    base = torchao_base(saved, torchao.Int8WeightOnlyConfig())
    check_torchao_life_cycle(base, tokens, tolerance=1e-5, rounding=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchao_int4_weight_only_on_the_cpu(saved, tokens, dtype):
    """torchao's 4-bit kernel for CPUs: its packing cannot be dequantised, so W0 comes out of its product."""
    torchao = pytest.importorskip(
        "torchao.prototype.quantization.int4", reason="torchao lacks its 4-bit kernel for CPUs"
    )
    plain = AutoModelForCausalLM.from_pretrained(saved, dtype=dtype)
    base = torchao_base(saved, torchao.PrototypeInt4WeightOnlyConfig(group_size=32), dtype=dtype)
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(NotImplementedError):  # torchao's own answer for a layout that it cannot dequantise
        base.get_submodule(name).weight.dequantize()
    model = adapt(base)
    for layer_name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"):
        weight = plain.get_submodule(layer_name).weight
        found = model.base_model.model.get_submodule(layer_name).base_weight()
        assert 0.01 < (found - weight).norm() / weight.norm() < 0.15  # what 4 bits lose
    model.unload()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    check_torchao_life_cycle(base, tokens, tolerance, rounding=0.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torchao's tile-packed 4-bit kernel needs a GPU")
def test_torchao_int4_weight_only_on_a_gpu(saved, tokens):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    config = torchao.Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d")
    base = torchao_base(saved, config, device="cuda", dtype=torch.bfloat16)
    check_torchao_life_cycle(base, tokens.cuda(), tolerance=0.02, rounding=0.5)


def quantised(saved, kind):
    if kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    elif kind == "torchao":
        torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    else:
        return load(saved, kind, double=True)
    return AutoModelForCausalLM.from_pretrained(saved, quantization_config=config, dtype=torch.float32).eval()


def anatomy(layer):
    """What a quantised layer consists of: each tensor's bytes, and of which attributes."""
    weight = layer.weight
    found = {"attributes": sorted(vars(layer)), "of the weight": sorted(vars(weight)), "kind": type(weight)}
    for name in ("data", "qdata", "scale", "SCB"):
        value = getattr(weight, name, None)
        if isinstance(value, torch.Tensor) and type(value) in (torch.Tensor, nn.Parameter):
            found[name] = value.contiguous().view(torch.uint8).numpy().tobytes()
    return found


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao"])
def test_a_merge_that_is_interrupted_anywhere(saved, kind):
    """The base is what it was, whatever PEFT had taken out of it by then; after a first merge, what that left."""
    model = adapt(quantised(saved, kind), target_modules=["q_proj"], layers_to_transform=[0], smoa_alpha=8)
    model.add_adapter(
        "other", SMoAConfig(r=4, target_modules=["q_proj"], layers_to_transform=[0], init_weights=False)
    )
    (layer,) = layer_list(model)
    x = torch.randn(5, layer.in_features)
    expected = layer(x)
    calls = count(lambda: layer.merge(adapter_names=["default"]))
    merged = layer(x)
    layer.unmerge()
    assert calls > 5
    for first, wanted in ((["default"], expected), (["other"], merged)):
        for n in range(1, calls + 1):
            whole, base = anatomy(layer.base_layer), layer.base_layer
            with pytest.raises(KeyboardInterrupt), FailingAt(n, KeyboardInterrupt):
                layer.merge(adapter_names=first)
            assert layer.base_layer is base
            assert anatomy(base) == whole
            assert torch.equal(layer(x), wanted), n
            assert layer.merged == (first == ["other"])
        if first == ["default"]:
            layer.merge(adapter_names=first)
            assert torch.equal(layer(x), merged)
    layer.unmerge()
    assert torch.equal(layer(x), expected)
