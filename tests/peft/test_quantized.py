"""A quantised base: of bitsandbytes, torchao or transformers' FP8; and the buffer W0 is dequantised into."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from adapted import WEIGHTS, layer_list, layers
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils import get_peft_model_state_dict
from peft.utils.quantization_utils import Bnb4bitBackend
from safetensors.torch import load_file
from test_faults import FailingAt, count
from tiny_models import tiny_llama
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from transformers.integrations.finegrained_fp8 import FP8GroupedLinear, FP8Linear

from smoa_kernels import smoa_linear
from smoa_kernels.definition import spectral_order
from smoa_kernels.definition.block_rule import BlockRule
from smoa_kernels.definition.sketch import sketch_weight
from smoa_kernels.peft import SMoAConfig
from smoa_kernels.peft import dequantize as module
from smoa_kernels.peft.dequantize import ScratchPool
from smoa_kernels.peft.file_format import STATE_KEYS, read_blocks

bnb = pytest.importorskip("bitsandbytes", reason="the extra of quantised bases is not installed")
torchao = pytest.importorskip("torchao.quantization", reason="the extra of quantised bases is not installed")
int4 = pytest.importorskip(
    "torchao.prototype.quantization.int4", reason="torchao lacks its 4-bit kernel for CPUs"
)
mx_formats = pytest.importorskip(
    "torchao.prototype.mx_formats.inference_workflow", reason="torchao lacks its 4-bit floats"
)
CPU = torch.device("cpu")
PANEL = 700


def four_bits(kind, double=False, compute=torch.float32):
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute,
    )


def float8(model, block=(48, 32)):
    """A plain model's linear layers as transformers' `FP8Linear`, whose own product needs a GPU."""
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and "lm_head" not in name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, float8_layer(linear, block))
    return model


def float8_layer(linear, block):
    layer = FP8Linear(linear.in_features, linear.out_features, block, has_bias=linear.bias is not None)
    weight, (height, width) = linear.weight.data.float(), block or linear.weight.shape
    of_weight = torch.empty_like(weight)
    scales = torch.empty(-(-weight.shape[0] // height), -(-weight.shape[1] // width))
    for row, col in np.ndindex(*scales.shape):
        part = np.s_[row * height : (row + 1) * height, col * width : (col + 1) * width]
        of_weight[part] = scales[row, col] = weight[part].abs().max() / 448
    layer.weight = nn.Parameter((weight / of_weight).to(torch.float8_e4m3fn), requires_grad=False)
    layer.weight_scale_inv = nn.Parameter(scales.view(()) if block is None else scales, requires_grad=False)
    layer.bias = linear.bias
    layer.wanted = layer.weight.float() * of_weight  # W0
    return layer


KINDS = {
    "nf4": four_bits("nf4"),
    "nf4, double": four_bits("nf4", double=True),
    "fp4": four_bits("fp4"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": TorchAoConfig(torchao.Int8WeightOnlyConfig()),
    "torchao int4": TorchAoConfig(int4.PrototypeInt4WeightOnlyConfig(group_size=32)),
    "torchao float8": TorchAoConfig(torchao.Float8WeightOnlyConfig()),
    "torchao nvfp4": TorchAoConfig(mx_formats.NVFP4WeightOnlyConfig()),
    "fp8": float8,
}
SLOW = pytest.mark.slow
# `make test` meets a kind of each library.
EACH = [pytest.param(kind, marks=[] if kind in ("nf4", "torchao int8", "fp8") else SLOW) for kind in KINDS]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


def load(folder, config, dtype=torch.float32, device="cpu"):
    """The base in the folder `saved`, quantised."""
    if callable(config):
        return config(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)).eval()
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=dtype, device_map=device
    ).eval()


def adapt(model, **settings):
    defaults = {"r": 4, "target_modules": "all-linear", "init_weights": False, "smoa_alpha": 0.5}
    torch.manual_seed(0)
    return get_peft_model(model, SMoAConfig(**{**defaults, **settings}))


class Largest(TorchDispatchMode):
    """Notes the most elements of a floating-point tensor that an operator gives, but for one at a known place."""

    def __init__(self, known_place=None):
        super().__init__()
        self.known_place, self.elements = known_place, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if type(tensor) is torch.Tensor and tensor.is_floating_point() and tensor.itemsize > 1:
                storage = tensor.untyped_storage()
                if storage.data_ptr() != self.known_place:
                    self.elements = max(self.elements, storage.nbytes() // tensor.element_size())
        return result


@pytest.fixture(params=EACH)
def model(request, saved):
    """An adapted model over a base of each kind, in training mode."""
    return adapt(load(saved, KINDS[request.param])).train()


@pytest.fixture
def nf4(saved):
    return adapt(load(saved, KINDS["nf4"])).train()


# What a layer computes


OTHER_ORDERS = [("nf4", {"block_order": "contiguous"}), ("torchao int8", {"granule": 8})]


@pytest.mark.parametrize(
    ("kind", "order"), [*(pytest.param(*p.values, {}, marks=p.marks) for p in EACH), *OTHER_ORDERS]
)
def test_outputs_and_gradients_are_those_over_the_dequantised_weight(saved, kind, order):
    model = adapt(load(saved, KINDS[kind]), smoa_dropout=0.4, **order).train()
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


def test_the_weights_values_are_not_kept_for_backward(saved):
    """Not either where a second adapter drops out differently: its product is a dense one, recomputed in backward."""
    model = adapt(load(saved, KINDS["nf4"]), smoa_dropout=0.5)
    model.add_adapter("other", SMoAConfig(r=3, target_modules="all-linear", init_weights=False))
    layer = layer_list(model.train())[0]
    x, dy, shapes = torch.randn(5, layer.in_features), torch.randn(5, layer.out_features), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        layer(x)
        model.base_model.set_adapter(["default", "other"])
        y = layer(x)
    assert (layer.out_features, layer.in_features) not in shapes
    y.backward(dy)
    found = [factor["other"].grad.clone() for factor in (layer.smoa_A, layer.smoa_B)]
    model.zero_grad()
    model.base_model.set_adapter("other")
    layer(x).backward(dy)
    for gradient, factor in zip(found, (layer.smoa_A, layer.smoa_B), strict=True):
        torch.testing.assert_close(gradient, factor["other"].grad)


def test_several_adapters_and_mixed_batches(nf4, tokens):
    model = nf4
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
    expected = nn.functional.linear(x, layer.base_weight() + delta)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


# The life of an adapter


def check_life_cycle(base, tokens, tolerance, rounding):
    """A fresh adapter changes little, trains, merges by requantising, and unmerges exactly."""
    expected = base(tokens).logits  # on some CPUs this packs bitsandbytes' weights anew
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


def anatomy(layer):
    """What a quantised layer consists of: each tensor's bytes, and of which attributes."""
    weight = layer.weight
    found = {"attributes": sorted(vars(layer)), "of the weight": sorted(vars(weight)), "kind": type(weight)}
    for name in ("data", "qdata", "scale", "SCB"):
        value = getattr(weight, name, None)
        if isinstance(value, torch.Tensor) and type(value) in (torch.Tensor, nn.Parameter):
            found[name] = value.contiguous().view(torch.uint8).numpy().tobytes()
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
        # bitsandbytes' own product rounds x to int8 as well, ours does not.
        pytest.param(KINDS["int8"], torch.float32, 0.03, 0.03, id="int8", marks=SLOW),
        pytest.param(KINDS["torchao int8"], torch.float32, 1e-5, 0.03, id="torchao int8"),
        pytest.param(KINDS["torchao int4"], torch.float32, 1e-5, 0.5, id="torchao int4", marks=SLOW),
        pytest.param(KINDS["torchao float8"], torch.float32, 1e-5, 0.1, id="torchao float8", marks=SLOW),
        pytest.param(KINDS["torchao nvfp4"], torch.float32, 1e-5, 0.5, id="torchao nvfp4", marks=SLOW),
        pytest.param(KINDS["torchao int4"], torch.bfloat16, 0.02, 0.5, id="torchao int4, bf16", marks=SLOW),
    ],
)
def test_life_cycle(saved, tokens, config, dtype, tolerance, rounding):
    check_life_cycle(load(saved, config, dtype), tokens, tolerance, rounding)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torchao's tile-packed 4-bit kernel needs a GPU")
def test_life_cycle_of_torchao_int4_on_a_gpu(saved, tokens):
    config = torchao.Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d")
    base = load(saved, TorchAoConfig(config), torch.bfloat16, "cuda")
    check_life_cycle(base, tokens.cuda(), tolerance=0.02, rounding=0.5)


def test_a_packing_that_cannot_be_dequantised(saved):
    """torchao's 4-bit kernel for CPUs: W0 comes out of its product."""
    plain = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    model = adapt(load(saved, KINDS["torchao int4"])).base_model.model
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"):
        weight, layer = plain.get_submodule(name).weight, model.get_submodule(name)
        with pytest.raises(NotImplementedError):
            layer.base_layer.weight.dequantize()
        assert 0.01 < (layer.base_weight() - weight).norm() / weight.norm() < 0.15  # what 4 bits lose


@pytest.mark.parametrize("block", [None, (48, 32), (64, 64), (128, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_blocks_are_read_as_they_were_scaled(block, dtype, pool):
    base = nn.Linear(72, 200)
    model = adapt(nn.Sequential(float8_layer(base, block)), target_modules=["0"])
    (layer,) = layer_list(model)
    assert torch.equal(layer.base_weight(), layer.base_layer.wanted)
    with layer._dequantized(dtype) as weight:
        assert torch.equal(weight, layer.base_layer.wanted.to(dtype))
    assert layer.smoa_A["default"].dtype == torch.float32


@SLOW
def test_panels_of_nvfp4_start_where_its_scales_do(pool):
    base = nn.Sequential(nn.Linear(64, 304, bias=False, dtype=torch.bfloat16))
    torchao.quantize_(base, mx_formats.NVFP4WeightOnlyConfig())
    weight = base[0].weight
    buffer = torch.empty(304, 64)
    with torch.no_grad(), Largest(buffer.data_ptr()) as largest:
        module._fill_from_torchao(buffer, weight)
    assert torch.equal(buffer, weight.dequantize().float())
    assert largest.elements <= 128 * 64 * 2


def test_float8_takes_no_merged_weight(saved):
    model = adapt(load(saved, float8))
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
    )  # FP4, two in a byte
    for kind in (layer, FP8GroupedLinear(8, 32, 2)):
        with pytest.raises(ValueError, match=rf"weight of {type(kind).__name__} is torch.*dequantize=True"):
            adapt(nn.Sequential(kind), target_modules=["0"])


@SLOW
def test_training_over_a_prepared_model(saved, tokens):
    base = prepare_model_for_kbit_training(load(saved, KINDS["nf4"]))
    model = adapt(base, init_weights=True, smoa_alpha=4).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(8):
        loss = model(tokens, labels=tokens).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


def test_adapters_move_between_a_base_and_its_quantised_form(saved, nf4, tokens, tmp_path, recwarn):
    model = nf4.eval()
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(saved, KINDS["nf4"]), tmp_path, strict_base=True).eval()
    assert torch.equal(again(tokens).logits, expected)
    plain = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    over_plain = PeftModel.from_pretrained(plain, tmp_path, strict_base=True).eval()
    assert (over_plain(tokens).logits - expected).norm() < 0.3 * expected.norm()
    assert not [w for w in recwarn if "another base weight" in str(w.message)]


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize("order", ["contiguous", "random"])
def test_blocks_that_need_no_weight_dequantise_none_at_injection(
    saved, kind, order, tokens, tmp_path, monkeypatch
):
    """The sketch, which tells one base from another, is computed when the adapter is saved, and then it is W0's."""

    def never(*_):
        raise AssertionError("W0 was dequantised, or a spectrum computed")

    base = load(saved, KINDS[kind])
    with monkeypatch.context() as injecting, Largest() as largest:
        injecting.setattr(spectral_order, "spectral_centroids", never)
        injecting.setattr("smoa_kernels.peft.layer.read_weight", never)
        injecting.setattr("smoa_kernels.peft.layer.dequantized", never)
        model = adapt(base, block_order=order, granule=8, smoa_alpha=8).eval()
        model.add_adapter("late", SMoAConfig(r=4, target_modules="all-linear", inference_mode=True))
    assert 0 < largest.elements < min(layer.in_features * layer.out_features for layer in layer_list(model))
    expected = model(tokens).logits
    sketches = {name: sketch_weight(layer.base_weight()) for name, layer in layers(model).items()}
    if kind != "fp8":  # which takes no merged weight
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "late"):
        state = load_file(folder / WEIGHTS)
        for name, sketch in sketches.items():
            found = read_blocks(name, {key: state[f"{name}.{key}"] for key in STATE_KEYS}).sketch
            torch.testing.assert_close(found, sketch, rtol=1e-3, atol=1e-3)
    again = PeftModel.from_pretrained(load(saved, KINDS[kind]), tmp_path, strict_base=True).eval()
    assert torch.equal(again(tokens).logits, expected)


@SLOW
@pytest.mark.parametrize("kind", ["nf4, double", "int8", "torchao int8"])
def test_a_merge_that_is_interrupted_anywhere(saved, kind):
    """The base is what it was, whatever PEFT had taken out of it by then; after a first merge, what that left."""
    one_layer = {"target_modules": ["q_proj"], "layers_to_transform": [0], "init_weights": False}
    model = adapt(load(saved, KINDS[kind]), smoa_alpha=8, **one_layer)
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


# The buffer that W0 is dequantised into: used again, never by two at once, never referred to later


@pytest.fixture
def pool(monkeypatch):
    """A pool of the test's own, and panels of some rows."""
    fresh = ScratchPool()
    monkeypatch.setattr(module, "_SCRATCH", fresh)
    monkeypatch.setattr(module, "_PANEL_ELEMENTS", {"cpu": PANEL, "gpu": PANEL})
    return fresh


def buffers(pool):
    return [buffer for free in pool._free.values() for buffer in free]


def gradients(model, tokens, before_backward=lambda: None):
    torch.manual_seed(1)
    model.zero_grad()
    loss = model(tokens).logits.square().sum()
    before_backward()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def without_a_buffer(model, tokens, monkeypatch):
    """The gradients where each call dequantises anew, as PEFT does."""
    read = module.read_weight
    with monkeypatch.context() as allocating:
        allocating.setattr(module, "_filler", lambda *_: None)
        # Rows side by side, as in the buffer: torchao's int4 comes transposed, which a GEMM may sum otherwise.
        allocating.setattr(module, "read_weight", lambda *given: read(*given).contiguous())
        return gradients(model, tokens)


def test_the_buffer_holds_what_peft_reads(model, pool):
    for dtype in (torch.float32, torch.bfloat16):
        for layer in layer_list(model):
            with layer._dequantized(dtype) as weight:
                found = weight.clone()
            assert weight.data_ptr() == buffers(pool)[-1].data_ptr()
            assert torch.equal(found, layer.base_weight().to(dtype))
    assert {buffer.dtype for buffer in buffers(pool)} == {torch.float32, torch.bfloat16}
    assert len(buffers(pool)) == 2


def test_one_buffer_serves_every_layer_and_nothing_needs_it_later(model, tokens, pool, monkeypatch):
    expected = without_a_buffer(model, tokens, monkeypatch)
    assert not buffers(pool)
    places = []

    def spoil():
        (buffer,) = buffers(pool)
        assert buffer.numel() == 128 * 64
        places.append(buffer.fill_(torch.nan).data_ptr())

    for name, gradient in gradients(model, tokens, spoil).items():
        assert torch.equal(gradient, expected[name])
    assert [buffer.data_ptr() for buffer in buffers(pool)] == places


def test_nothing_of_the_weights_size_is_allocated(model, pool):
    """What a library returns is a panel of it."""

    for layer in layer_list(model):
        with layer._dequantized(torch.float32) as weight:
            place, size = weight.untyped_storage().data_ptr(), weight.numel()
        with Largest(place) as largest, layer._dequantized(torch.float32) as weight:
            assert weight.data_ptr() == place
        # torchao's int4 takes one panel and returns one; its NVFP4 has panels of 128 rows, these layers whole.
        at_most = size if hasattr(layer.base_layer.weight, "is_swizzled_scales") else 2 * PANEL
        assert 0 < largest.elements <= at_most <= size


def test_forwards_and_backwards_of_two_layers_interleave(nf4, pool):
    first, *_, second = layer_list(nf4)
    assert first.base_weight().shape != second.base_weight().shape
    inputs = [torch.randn(5, layer.in_features, requires_grad=True) for layer in (first, second)]

    def alone(layer, x):
        layer(x).square().sum().backward()
        found = [x.grad, layer.smoa_A["default"].grad, layer.smoa_B["default"].grad]
        x.grad = layer.smoa_A["default"].grad = layer.smoa_B["default"].grad = None
        return found

    expected = [alone(first, inputs[0]), alone(second, inputs[1])]

    @torch.enable_grad()
    def inside(gradient):  # a forward and a backward while the other layer's backward is under way
        assert all(map(torch.equal, alone(second, inputs[1]), expected[1]))
        return gradient

    outputs = [first(inputs[0]), second(inputs[1]).detach()]
    outputs[0].register_hook(inside)
    outputs[0].square().sum().backward()
    found = [inputs[0].grad, first.smoa_A["default"].grad, first.smoa_B["default"].grad]
    assert all(map(torch.equal, found, expected[0]))
    assert len(buffers(pool)) == 1


def test_recomputation_inference_and_merging_leave_the_gradients_alone(nf4, tokens, pool):
    with torch.inference_mode():  # a buffer made in that mode serves training
        nf4(tokens)
    expected = gradients(nf4, tokens)
    nf4.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    recomputed = gradients(nf4, tokens)
    nf4.gradient_checkpointing_disable()
    assert len(buffers(pool)) == 1
    over_merged = gradients(nf4, tokens, nf4.merge_adapter)  # a backward after a merge is still of W0
    for name, gradient in expected.items():
        torch.testing.assert_close(recomputed[name], gradient)
        torch.testing.assert_close(over_merged[name], gradient)


def test_an_unlent_buffer_is_lent_again_and_grows():
    pool = ScratchPool()
    with pool.borrow((3, 4), torch.float32, CPU) as first:
        assert first.shape == (3, 4)
        place = first.data_ptr()
    with pool.borrow((6, 2), torch.float32, CPU) as again:
        assert again.data_ptr() == place
    with pool.borrow((5, 5), torch.float32, CPU) as larger:
        assert larger.is_contiguous()
    with pytest.raises(RuntimeError), pool.borrow((5, 5), torch.float32, CPU):
        raise RuntimeError
    assert [buffer.numel() for buffer in buffers(pool)] == [25]


def test_a_captured_graph_has_a_buffer_of_its_own(monkeypatch):
    """Capture is pretended, and the test's references to what was allocated under it stand for the graphs'."""
    pool = ScratchPool()
    with pool.borrow((4,), torch.float32, CPU) as eager:
        place = eager.data_ptr()
    graphs = []
    monkeypatch.setattr(module, "_capturing", lambda device: True)
    for _ in range(2):
        with pool.borrow((4,), torch.float32, CPU) as captured:
            graphs.append(captured)
    monkeypatch.undo()
    with pool.borrow((4,), torch.float32, CPU) as eager:
        assert eager.data_ptr() == place  # the eager pass goes on with its own
    assert len({place, *(buffer.data_ptr() for buffer in graphs)}) == 3
    assert len(buffers(pool)) == 1


def test_nested_and_threaded_use_never_shares():
    pool = ScratchPool()
    with (
        pool.borrow((4,), torch.float32, CPU) as outer,
        pool.borrow((4,), torch.float32, CPU) as inner,
    ):
        outer.fill_(1)
        inner.fill_(2)
        assert outer.tolist() == [1] * 4
    assert len(buffers(pool)) == 2
    barrier, seen = threading.Barrier(4), []

    def use(value):
        for _ in range(50):
            with pool.borrow((64,), torch.float32, CPU) as buffer:
                buffer.fill_(value)
                barrier.wait(timeout=10)
                seen.append(bool((buffer == value).all()))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(use, range(4)))
    assert seen == [True] * 200
    assert len(buffers(pool)) == 4


# bitsandbytes' 4-bit kernels for GPUs write where they are told to


def four_bit_layer(kind="nf4", width=64):
    layer = bnb.nn.Linear4bit(width, 96, bias=False, quant_type=kind)
    weight = torch.randn(96, width, generator=torch.Generator().manual_seed(0))
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=kind)
    return layer


@SLOW
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("width", [64, 1216, 63, 96, 100])  # of the last three no row is whole blocks
def test_panels_of_four_bit_weights_are_whole_blocks(kind, width, pool):
    layer = four_bit_layer(kind, width).to("cpu")
    expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    with module.dequantized(Bnb4bitBackend(), layer, torch.float32) as weight:
        assert torch.equal(weight, expected)


def test_a_kernel_that_takes_a_buffer_is_given_it(pool):
    """The CPU's gets that form, for the length of the test."""
    layer, places = four_bit_layer().to("cpu"), []

    def fill(*given):
        *args, out = given
        places.append(out.data_ptr())
        out.copy_(torch.ops.bitsandbytes.dequantize_4bit.default(*args))

    with torch.library._scoped_library("bitsandbytes", "IMPL") as library:
        library.impl("dequantize_4bit.out", fill, "CPU")
        for dtype in (torch.float32, torch.bfloat16):  # the second is not the weight's: it is cast
            with module.dequantized(Bnb4bitBackend(), layer, dtype) as weight:
                assert torch.equal(weight, module.read_weight(Bnb4bitBackend(), layer).to(dtype))
    (buffer, _) = sorted(buffers(pool), key=lambda buffer: -buffer.element_size())
    assert places[0] == buffer.data_ptr()
    assert len(places) == len(set(places)) == 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes' own kernel for it is CUDA's")
def test_the_gpus_kernel_fills_the_buffer(pool):
    layer = four_bit_layer().cuda()
    expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    for _ in range(2):
        with module.dequantized(Bnb4bitBackend(), layer, torch.float32) as weight:
            assert torch.equal(weight, expected)
            assert len(buffers(pool)) == 0
    assert [buffer.data_ptr() for buffer in buffers(pool)] == [weight.data_ptr()]
