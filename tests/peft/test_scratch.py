"""The buffer that quantised weights are dequantised into: used again, never by two at once, never referred to later."""

import threading

import pytest
import torch
from adapted import layer_list
from peft import get_peft_model
from peft.utils.quantization_utils import Bnb4bitBackend
from tiny_models import tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from smoa_kernels.peft import SMoAConfig
from smoa_kernels.peft import dequantize as module
from smoa_kernels.peft.scratch import ScratchPool

bnb = pytest.importorskip("bitsandbytes", reason="the extra of quantised bases is not installed")
torchao = pytest.importorskip("torchao.quantization", reason="the extra of quantised bases is not installed")
int4 = pytest.importorskip(
    "torchao.prototype.quantization.int4", reason="torchao lacks its 4-bit kernel for CPUs"
)
CPU = torch.device("cpu")
PANEL = 700


def four_bits(kind, double=False):
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )


KINDS = {
    "nf4": four_bits("nf4"),
    "nf4, double": four_bits("nf4", double=True),
    "fp4": four_bits("fp4"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": TorchAoConfig(torchao.Int8WeightOnlyConfig()),
    "torchao int4": TorchAoConfig(int4.PrototypeInt4WeightOnlyConfig(group_size=32)),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


@pytest.fixture(params=KINDS)
def make_model(request, saved):
    def make(dtype=torch.float32):
        base = AutoModelForCausalLM.from_pretrained(
            saved, quantization_config=KINDS[request.param], dtype=dtype, device_map="cpu"
        )
        torch.manual_seed(0)
        config = SMoAConfig(r=4, target_modules="all-linear", init_weights=False, smoa_alpha=0.5)
        return get_peft_model(base, config).train()

    return make


@pytest.fixture
def pool(monkeypatch):
    """A pool of the test's own, and panels of some rows."""
    fresh = ScratchPool()
    monkeypatch.setattr(module, "_SCRATCH", fresh)
    monkeypatch.setattr(module, "_PANEL_ELEMENTS", {"cpu": PANEL, "gpu": PANEL})
    return fresh


def buffers(pool):
    return [buffer for free in pool._free.values() for buffer in free]


def gradients(model, tokens):
    torch.manual_seed(1)
    model.zero_grad()
    model(tokens).logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def without_a_buffer(model, tokens, monkeypatch):
    """The gradients where each call dequantises anew, as PEFT does."""
    read = module.read_weight
    with monkeypatch.context() as allocating:
        allocating.setattr(module, "_filler", lambda *_: None)
        # Rows side by side, as in the buffer: torchao's int4 comes transposed, which a GEMM may sum otherwise.
        allocating.setattr(module, "read_weight", lambda *given: read(*given).contiguous())
        return gradients(model, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_buffer_holds_what_peft_reads(make_model, pool, dtype):
    for layer in layer_list(make_model()):
        with layer._dequantized(dtype) as weight:
            found = weight.clone()
        assert weight.data_ptr() == buffers(pool)[0].data_ptr()
        assert torch.equal(found, layer.base_weight().to(dtype))
    assert len(buffers(pool)) == 1


def test_one_buffer_serves_every_layer_and_nothing_needs_it_later(make_model, tokens, pool, monkeypatch):
    model = make_model()
    expected = without_a_buffer(model, tokens, monkeypatch)
    assert not buffers(pool)
    model.zero_grad()
    output = model(tokens).logits
    (buffer,) = buffers(pool)
    assert buffer.numel() == 128 * 64
    buffer.fill_(torch.nan)
    output.square().sum().backward()
    (same,) = buffers(pool)
    assert same.data_ptr() == buffer.data_ptr()
    for name, gradient in expected.items():
        assert torch.equal(model.get_parameter(name).grad, gradient)


def test_nothing_of_the_weights_size_is_allocated(make_model, pool):
    """What a library returns is a panel of it."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if type(tensor) is torch.Tensor and tensor.is_floating_point():
                    storage = tensor.untyped_storage()
                    if storage.data_ptr() != place:
                        self.elements = max(self.elements, storage.nbytes() // tensor.element_size())
            return result

    for layer in layer_list(make_model()):
        with layer._dequantized(torch.float32) as weight:
            place, size = weight.untyped_storage().data_ptr(), weight.numel()
        with Largest() as largest, layer._dequantized(torch.float32) as weight:
            assert weight.data_ptr() == place
        assert 0 < largest.elements <= 2 * PANEL < size  # torchao's int4 takes one panel and returns one


def test_forwards_and_backwards_of_two_layers_interleave(make_model, pool):
    first, *_, second = layer_list(make_model())
    assert first.base_weight().shape != second.base_weight().shape
    inputs = [torch.randn(5, layer.in_features, requires_grad=True) for layer in (first, second)]

    def alone(layer, x):
        (layer(x).square().sum()).backward()
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


def test_threads_do_not_meet_in_a_buffer(make_model, tokens, pool):
    model = make_model().eval()
    with torch.no_grad():
        expected = model(tokens).logits
        found, threads = [], []
        for _ in range(3):
            threads.append(threading.Thread(target=lambda: found.append(run())))

        @torch.no_grad()
        def run():
            return [model(tokens).logits for _ in range(4)]

        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert len(found) == 3
    assert all(torch.equal(output, expected) for outputs in found for output in outputs)
    assert 1 <= len(buffers(pool)) <= 3


def test_recomputation_in_backward(make_model, tokens, pool):
    model = make_model()
    expected = gradients(model, tokens)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradients(model, tokens)
    assert len(buffers(pool)) == 1
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


def test_a_buffer_made_in_inference_mode_serves_training(make_model, tokens, pool):
    model = make_model()
    with torch.inference_mode():
        model(tokens)
    assert len(buffers(pool)) == 1
    model(tokens).logits.sum().backward()
    assert len(buffers(pool)) == 1


def test_merged_weights_are_not_read_in_backward(make_model, tokens, pool):
    """A backward that runs after a merge is still of W0."""
    model = make_model()
    expected = gradients(model, tokens)
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(tokens).logits.square().sum()
    model.merge_adapter()
    loss.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


# The pool


def test_every_dtype_has_its_own(pool):
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        with pool.borrow((3,), dtype, CPU) as buffer:
            assert buffer.dtype == dtype
    assert {buffer.dtype for buffer in buffers(pool)} == {torch.float32, torch.bfloat16}


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

    threads = [threading.Thread(target=use, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert len(seen) == 200
    assert all(seen)
    assert len(buffers(pool)) == 4


# bitsandbytes' 4-bit kernels for GPUs write where they are told to


def four_bit_layer(kind="nf4", width=64):
    layer = bnb.nn.Linear4bit(width, 96, bias=False, quant_type=kind)
    weight = torch.randn(96, width, generator=torch.Generator().manual_seed(0))
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=kind)
    return layer


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
