"""Every kind of base: layers compute the definition, saved adapters load as they were, merges are undone exactly."""

import json
from dataclasses import replace
from functools import partial

import adapted
import pytest
import tiny_experts
import torch
from adapted import CONFIG, WEIGHTS, anatomy, close, layer_list, logits
from peft import PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from problems import DEVICE, relative_error
from safetensors.torch import load_file
from tiny_models import tiny_gpt2, tiny_llama

from smoa_kernels.adapter import STATE_KEYS
from smoa_kernels.adapter_folder.settings import FORMAT_VERSION
from smoa_kernels.definition.block_rule import BlockRule
from smoa_kernels.definition.dropout import Dropout, draw_seed
from smoa_kernels.definition.reference import delta_weight
from smoa_kernels.peft import Experts, SMoALayer
from smoa_kernels.peft.linear import adapted_linear, dequantized_linear

LINEAR = {"llama": tiny_llama, "gpt2": tiny_gpt2}
EXPERTS = ("qwen3_moe", "mixtral", "gpt_oss", "nemotron_h")
QUANTISED = ("nf4", "torchao int8")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CLOSE = {F32: 1e-5, F16: 5e-3, BF16: 4e-2}
SAME = dict.fromkeys(CLOSE, 0) if DEVICE.type == "cpu" else CLOSE
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
plain = partial(pytest.param, marks=pytest.mark.numerical)
slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture
def make(request):
    """A function that makes the base named by the test's `kind`, the same each time."""
    kind = request.getfixturevalue("kind")
    if kind in LINEAR:
        return lambda dtype=F32: LINEAR[kind]().to(dtype)
    if kind in EXPERTS:
        return lambda dtype=F32: tiny_experts.tiny_experts(kind).to(dtype)
    from quantized_bases import load  # skips if the extra is not installed

    return partial(load, request.getfixturevalue("quantizable"), kind)


def adapt(model, kind, **settings):
    torch.manual_seed(3)
    return (tiny_experts if kind in EXPERTS else adapted).adapt(model, **{"smoa_alpha": 1.0, **settings})


MIXES = {
    "one": [{"smoa_alpha": 3.0}],
    "agree": [{"r": 6}, {"r": 4, "smoa_alpha": 2}],
    "uneven": [{}, {"r": 7, "block_ranks": [0, 4, 3]}],
    "differ": [{"block_order": "contiguous"}, {"r": 4, "num_blocks": 2, "granule": 8}],
}
FIRST_OF_THEIR_LIBRARY, FURTHER = (*QUANTISED, "fp8"), ("nf4, double", "fp4", "int8")
FURTHER = (*FURTHER, "torchao int4", "torchao float8", "torchao nvfp4")
ADAPTED = [
    *(plain(kind, mix, dtype) for kind in LINEAR for mix in MIXES for dtype in (F32, BF16)),
    *((kind, mix, F32) for kind in FIRST_OF_THEIR_LIBRARY for mix in ("one", "differ")),
    *(slow(kind, "one", F32) for kind in FURTHER),
]


@pytest.mark.parametrize(("kind", "mix", "dtype"), ADAPTED)
def test_active_adapters_compute_the_definition_with_one_product(kind, mix, dtype, make, monkeypatch):
    """Against float64, with dropout. Over a quantised base, W0 is the dequantised weight."""
    settings = [{"smoa_alpha": 0.5, "smoa_dropout": 0.4, **each} for each in MIXES[mix]]
    model = adapt(make(dtype), kind, **settings[0])
    for i, each in enumerate(settings[1:]):
        model.add_adapter(str(i), adapted.config(model.get_base_model(), **each))
    names = list(model.peft_config)
    model.train().base_model.set_adapter(names)
    calls = []
    for product in (adapted_linear, dequantized_linear):
        counted = lambda *given, product=product, **named: calls.append(1) or product(*given, **named)  # noqa: E731
        monkeypatch.setattr(f"smoa_kernels.peft.linear.{product.__name__}", counted)
    for layer in layer_list(model):
        factors = [factor for name in names for factor in (layer.smoa[name].A, layer.smoa[name].B)]
        for factor in factors:
            factor.data.add_(0.1)  # in padding too, which nothing reads
        biases = [bias for bias in (layer.get_base_layer().bias,) if bias is not None]
        x, dy = (torch.randn(5, size, dtype=dtype) for size in (layer.in_features, layer.out_features))
        leaves = [tensor.requires_grad_() for tensor in (x, *factors, *biases)]
        calls.clear()
        torch.manual_seed(1)
        y = layer(x)
        assert len(calls) == 1
        found = torch.autograd.grad(y, leaves, dy)

        torch.manual_seed(1)
        mask = Dropout(draw_seed(x.device), 0.4).multiplier(x.float()).double()
        wide = [tensor.detach().double().requires_grad_() for tensor in leaves]
        weight, given, deltas = layer.base_weight().double(), wide[0], []
        for i, name in enumerate(names):
            adapter = replace(layer.packed(name, weight), A=wide[2 * i + 1], B=wide[2 * i + 2])
            assert adapter.partition == layer.settings[name].rule.build(layer.base_weight())
            deltas.append(delta_weight(adapter))
            stored = layer.get_delta_weight(name)
            close((stored.T if layer.fan_in_fan_out else stored).double(), deltas[-1].detach())
        expected = sum(wide[1 + len(factors) :], given @ weight.T + (given * mask) @ sum(deltas).T)
        # One rounding, or two with a bias.
        close(y.double(), expected.detach(), 1e-5 if dtype == F32 else 2**-7 if biases else 2**-8)
        for ours, exact in zip(found, torch.autograd.grad(expected, wide, dy.double()), strict=True):
            close(ours.double(), exact, {F32: 1e-4, BF16: 2**-5}[dtype])


def made_anew(*_, **__):
    raise AssertionError("blocks were made anew")


ORDERS = [
    *((kind, order) for kind in LINEAR for order in ("contiguous", "spectral", "random")),
    *((kind, order) for kind in EXPERTS[:3] for order in ("contiguous", "spectral", "random", "shared")),
    *((kind, "spectral") for kind in QUANTISED),
]


@pytest.mark.numerical
@pytest.mark.parametrize(("kind", "order"), ORDERS)
def test_a_saved_adapter_is_loaded_bit_for_bit(kind, order, make, tokens, tmp_path, monkeypatch):
    settings = {"block_order": order, "granule": 2, "block_seed": 7}
    model = adapt(make(), kind, **settings)
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path)
    assert {key.rsplit(".", 1)[1] for key in load_file(tmp_path / WEIGHTS)} == set(STATE_KEYS)
    assert json.loads((tmp_path / CONFIG).read_text())["format_version"] == FORMAT_VERSION
    with monkeypatch.context() as loading:
        loading.setattr("smoa_kernels.definition.spectral_order.spectral_centroids", made_anew)
        loading.setattr(BlockRule, "of_shape", made_anew)
        for given in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
            loaded = PeftModel.from_pretrained(make(), tmp_path, strict_base=True, **given).eval()
            assert any(p.requires_grad for p in loaded.parameters()) == ("is_trainable" in given)
            assert torch.equal(logits(loaded, tokens), expected)
            loaded.load_adapter(tmp_path, "again", **given)
            loaded.set_adapter("again")
            assert torch.equal(logits(loaded, tokens), expected)
    for one, other in zip(layer_list(model), layer_list(loaded), strict=True):
        assert one.settings["default"].rule == other.settings["again"].rule == BlockRule(3, **settings)
        assert torch.equal(one.smoa["default"].row_block, other.smoa["again"].row_block)
    # The labels decide, whatever the configuration says; granules are recognised from them.
    different = adapt(make(), kind, block_order="contiguous" if order == "random" else "random", granule=1)
    logits(different, tokens)  # its index tensors exist before the other labels arrive
    set_peft_model_state_dict(different, get_peft_model_state_dict(model))
    assert torch.equal(logits(different, tokens), expected)


# A base, its dtype, how much a fresh adapter may change its outputs, and how much a merge may.
CYCLES = [
    *(plain(kind, dtype, CLOSE[dtype], CLOSE[dtype]) for kind in LINEAR for dtype in CLOSE),
    *(plain(kind, F32, SAME[F32], 1e-5) for kind in EXPERTS),
    *(plain(kind, BF16, SAME[BF16], 0.3) for kind in EXPERTS),  # routers may choose other experts
    ("nf4", F32, 0.02, 0.3),
    ("torchao int8", F32, 1e-5, 0.03),
    slow("nf4 in bf16", F32, 0.02, 0.3),
    slow("int8", F32, 0.03, 0.03),  # bitsandbytes' own GEMM also rounds x to int8; ours does not
    slow("torchao int4", F32, 1e-5, 0.5),
    slow("torchao float8", F32, 1e-5, 0.1),
    slow("torchao nvfp4", F32, 1e-5, 0.5),
    slow("torchao int4", BF16, 0.02, 0.5),
    pytest.param("torchao int4 on a GPU", BF16, 0.02, 0.5, marks=ON_GPU),
]


@pytest.mark.parametrize(("kind", "dtype", "fresh", "merging"), CYCLES)
def test_life_cycle(kind, dtype, fresh, merging, make, tokens):
    """A fresh adapter changes little, trains, merges by rounding (or quantising) once, and unmerges exactly."""
    base = make(dtype)
    tokens = tokens.to(base.device)
    # They may repack bitsandbytes' weights.
    before, of_one = (logits(base, some) for some in (tokens, tokens[:1, :1]))
    model = adapt(base, kind, init_weights=True)
    assert relative_error(logits(model, tokens), before) <= fresh
    assert relative_error(logits(model, tokens[:1, :1]), of_one) <= fresh
    logits(model, tokens).sum().backward()
    with torch.no_grad():
        for layer in layer_list(model):
            assert layer.smoa["default"].B.grad.any()
            layer.smoa["default"].B.normal_()
    expected, keys = logits(model, tokens), get_peft_model_state_dict(model).keys()
    bases = [anatomy(layer) for layer in layer_list(model)]
    model.merge_adapter(safe_merge=True)
    merged = logits(model, tokens)
    assert relative_error(merged, expected) < merging
    assert get_peft_model_state_dict(model).keys() == keys
    model.unmerge_adapter()
    assert [anatomy(layer) for layer in layer_list(model)] == bases
    assert torch.equal(logits(model, tokens), expected)
    model.merge_adapter()
    with torch.no_grad(), model.disable_adapter():  # this unmerges
        allowed = 0 if kind in LINEAR or kind in EXPERTS else fresh
        assert relative_error(logits(model, tokens), before) <= allowed
    unloaded = model.merge_and_unload()
    assert type(unloaded) is type(make(dtype))
    assert not any(isinstance(module, (Experts, SMoALayer)) for module in unloaded.modules())
    assert torch.equal(logits(unloaded, tokens), merged)
