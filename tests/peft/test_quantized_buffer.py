"""The buffer for the dequantised W0: it is reused, never shared by two users at once, and never kept."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from adapted import layer_list
from largest import Largest
from peft.utils.quantization_utils import Bnb4bitBackend
from quantized_bases import EACH, KINDS, SLOW, adapt, bnb, float8_layer, load, mx_formats, torchao
from torch import nn

from smoa_kernels.peft import dequantize as module

CPU = torch.device("cpu")
PANEL = 700


@pytest.fixture(params=EACH)
def model(request, quantizable):
    """An adapted model over a base of each kind, in training mode."""
    return adapt(load(quantizable, KINDS[request.param])).train()


@pytest.fixture
def nf4(quantizable):
    return adapt(load(quantizable, KINDS["nf4"])).train()


@pytest.fixture
def buffers(monkeypatch):
    """Free buffers (none at first), and the rows of a panel."""
    monkeypatch.setattr(module, "_FREE", [])
    monkeypatch.setattr(module, "_PANEL_ELEMENTS", {"cpu": PANEL, "gpu": PANEL})
    return module._FREE


def gradients(model, tokens, before_backward=lambda: None):
    torch.manual_seed(1)
    model.zero_grad()
    loss = model(tokens).logits.square().sum()
    before_backward()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def without_a_buffer(model, tokens, monkeypatch):
    """The gradients if each call dequantises into new memory, as PEFT does."""
    read = module.read_weight
    with monkeypatch.context() as allocating:
        allocating.setattr(module, "_filler", lambda *_: None)
        # Contiguous rows, as in the buffer: torchao's int4 is transposed, and a GEMM may sum that in another order.
        allocating.setattr(module, "read_weight", lambda *given: read(*given).contiguous())
        return gradients(model, tokens)


def test_the_buffer_holds_what_peft_reads_and_nothing_else_has_its_size(model, buffers):
    """A library dequantises one panel of it at a time."""
    for dtype in (torch.bfloat16, torch.float32):
        for layer in layer_list(model):
            with layer._dequantized(dtype) as weight:
                found = weight.clone()
            assert weight.data_ptr() == buffers[-1].data_ptr()
            assert torch.equal(found, layer.base_weight().to(dtype))
    assert len(buffers) == 1
    for layer in layer_list(model):
        place = buffers[0].data_ptr()
        with Largest(place) as largest, layer._dequantized(torch.float32) as weight:
            assert weight.data_ptr() == place
        # torchao's int4 takes and returns one panel; its NVFP4 has panels of 128 rows, so these layers are whole.
        swizzled = hasattr(layer.base_layer.weight, "is_swizzled_scales")
        assert 0 < largest.elements <= (weight.numel() if swizzled else 2 * PANEL) <= weight.numel()


def test_one_buffer_serves_every_layer_and_nothing_needs_it_later(model, tokens, buffers, monkeypatch):
    expected = without_a_buffer(model, tokens, monkeypatch)
    assert not buffers
    places = []

    def spoil():
        (buffer,) = buffers
        assert buffer.numel() == 128 * 64 * 4
        places.append(buffer.fill_(255).data_ptr())  # NaN in every floating-point dtype

    for name, gradient in gradients(model, tokens, spoil).items():
        assert torch.equal(gradient, expected[name])
    assert [buffer.data_ptr() for buffer in buffers] == places


def test_forwards_and_backwards_of_two_layers_interleave(nf4, buffers):
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
    def inside(gradient):  # a forward and a backward during the other layer's backward
        assert all(map(torch.equal, alone(second, inputs[1]), expected[1]))
        return gradient

    outputs = [first(inputs[0]), second(inputs[1]).detach()]
    outputs[0].register_hook(inside)
    outputs[0].square().sum().backward()
    found = [inputs[0].grad, first.smoa_A["default"].grad, first.smoa_B["default"].grad]
    assert all(map(torch.equal, found, expected[0]))
    assert len(buffers) == 1


def test_recomputation_inference_and_merging_leave_the_gradients_alone(nf4, tokens, buffers):
    with torch.inference_mode():  # a buffer made in inference mode is reused in training
        nf4(tokens)
    expected = gradients(nf4, tokens)
    nf4.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    recomputed = gradients(nf4, tokens)
    nf4.gradient_checkpointing_disable()
    assert len(buffers) == 1
    over_merged = gradients(nf4, tokens, nf4.merge_adapter)  # a backward after a merge still uses W0
    for name, gradient in expected.items():
        torch.testing.assert_close(recomputed[name], gradient)
        torch.testing.assert_close(over_merged[name], gradient)


def test_a_buffer_is_lent_again_and_grows(buffers):
    with module._scratch((3, 4), torch.float32, CPU) as first:
        place = first.data_ptr()
    with module._scratch((6, 2), torch.bfloat16, CPU) as again:
        assert again.data_ptr() == place
    with module._scratch((5, 5), torch.float32, CPU) as larger:
        assert larger.is_contiguous()
    with pytest.raises(RuntimeError), module._scratch((5, 5), torch.float32, CPU):
        raise RuntimeError
    assert [buffer.numel() for buffer in buffers] == [25 * 4]


def test_nested_and_threaded_use_never_shares(buffers):
    with (
        module._scratch((4,), torch.float32, CPU) as outer,
        module._scratch((4,), torch.float32, CPU) as inner,
    ):
        outer.fill_(1)
        inner.fill_(2)
        assert outer.tolist() == [1] * 4
    assert len(buffers) == 2
    barrier, seen = threading.Barrier(4), []

    def use(value):
        for _ in range(50):
            with module._scratch((64,), torch.float32, CPU) as buffer:
                buffer.fill_(value)
                barrier.wait(timeout=10)
                seen.append(bool((buffer == value).all()))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(use, range(4)))
    assert seen == [True] * 200
    assert len(buffers) == 4


def test_second_derivatives_are_refused(nf4):
    layer = layer_list(nf4)[0]
    x = torch.randn(5, layer.in_features, requires_grad=True)
    with pytest.raises(
        RuntimeError, match="second derivatives over a quantised base weight are not computed"
    ):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


# Weights read one panel at a time


@pytest.mark.parametrize("block", [None, (48, 32), (64, 64), (128, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_blocks_are_read_as_they_were_scaled(block, dtype, buffers):
    base = nn.Linear(72, 200)
    model = adapt(nn.Sequential(float8_layer(base, block)), target_modules=["0"])
    (layer,) = layer_list(model)
    assert torch.equal(layer.base_weight(), layer.base_layer.wanted)
    with layer._dequantized(dtype) as weight:
        assert torch.equal(weight, layer.base_layer.wanted.to(dtype))
    assert layer.smoa_A["default"].dtype == torch.float32


@SLOW
def test_panels_of_nvfp4_start_where_its_scales_do(buffers):
    base = nn.Sequential(nn.Linear(64, 304, bias=False, dtype=torch.bfloat16))
    torchao.quantize_(base, mx_formats.NVFP4WeightOnlyConfig())
    weight = base[0].weight
    buffer = torch.empty(304, 64)
    with torch.no_grad(), Largest(buffer.data_ptr()) as largest:
        module._fill_from_torchao(buffer, weight)
    assert torch.equal(buffer, weight.dequantize().float())
    assert largest.elements <= 128 * 64 * 2


# bitsandbytes' 4-bit kernels for GPUs write into a given buffer


def four_bit_layer(kind="nf4", width=64):
    layer = bnb.nn.Linear4bit(width, 96, bias=False, quant_type=kind)
    weight = torch.randn(96, width, generator=torch.Generator().manual_seed(0))
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=kind)
    return layer


@SLOW
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("width", [64, 1216, 63, 96, 100])  # rows of the last three are not whole blocks
def test_panels_of_four_bit_weights_are_whole_blocks(kind, width, buffers):
    layer = four_bit_layer(kind, width).to("cpu")
    expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    with module.dequantized(Bnb4bitBackend(), layer, torch.float32) as weight:
        assert torch.equal(weight, expected)


def test_a_kernel_that_takes_a_buffer_is_given_it(buffers):
    """The CPU kernel takes a buffer too for the length of this test."""
    layer, places = four_bit_layer().to("cpu"), []

    def fill(*given):
        *args, out = given
        places.append(out.data_ptr())
        out.copy_(torch.ops.bitsandbytes.dequantize_4bit.default(*args))

    with torch.library._scoped_library("bitsandbytes", "IMPL") as library:
        library.impl("dequantize_4bit.out", fill, "CPU")
        for dtype in (torch.float32, torch.bfloat16):  # the second is cast to another dtype
            with module.dequantized(Bnb4bitBackend(), layer, dtype) as weight:
                assert torch.equal(weight, module.read_weight(Bnb4bitBackend(), layer).to(dtype))
    assert places[0] == buffers[0].data_ptr()
    assert len(places) == len(set(places)) == 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes' own kernel for it is CUDA's")
def test_the_gpus_kernel_fills_the_buffer():
    layer = four_bit_layer().cuda()
    expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    with module.dequantized(Bnb4bitBackend(), layer, torch.float32) as weight:
        assert torch.equal(weight, expected)
