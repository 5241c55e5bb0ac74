"""The buffer that 4-bit weights are dequantised into: used again, never by two at once, never referred to later.

bitsandbytes writes into a given buffer on GPUs only; here its CPU kernel gets that form, for the length of a test.
"""

import threading

import pytest
import torch
from peft import get_peft_model
from peft.utils.quantization_utils import Bnb4bitBackend
from tiny_models import tiny_llama
from torch import nn

from smoa_kernels.peft import SMoAConfig
from smoa_kernels.peft import quantized as module
from smoa_kernels.peft.scratch import ScratchPool

bnb = pytest.importorskip("bitsandbytes", reason="the extra of quantised bases is not installed")
CPU = torch.device("cpu")


@pytest.fixture
def pool(monkeypatch):
    """A pool of the test's own, and the operator that fills its buffers."""
    fresh = ScratchPool()
    monkeypatch.setattr(module, "_SCRATCH", fresh)

    def fill(*given):
        *args, out = given
        out.copy_(torch.ops.bitsandbytes.dequantize_4bit.default(*args))

    with torch.library._scoped_library("bitsandbytes", "IMPL") as library:
        library.impl("dequantize_4bit.out", fill, "CPU")
        yield fresh


def buffers(pool):
    return [buffer for free in pool._free.values() for buffer in free]


@pytest.fixture
def make_model():
    def make(dtype=torch.float32):
        torch.manual_seed(0)
        model = tiny_llama(hidden_size=64, intermediate_size=96).to(dtype)
        for name, linear in list(model.model.named_modules()):
            if isinstance(linear, nn.Linear):
                packed = bnb.nn.Linear4bit(*linear.weight.shape[::-1], bias=False, quant_type="nf4")
                packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
                parent, _, child = name.rpartition(".")
                setattr(model.model.get_submodule(parent), child, packed.to("cpu"))
        config = SMoAConfig(r=4, target_modules=["q_proj", "up_proj", "down_proj"], init_weights=False)
        return get_peft_model(model, config).train()

    return make


def gradients(model, tokens):
    torch.manual_seed(1)
    model.zero_grad()
    model(tokens).logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_one_buffer_serves_every_layer_and_nothing_needs_it_later(make_model, tokens, request):
    model = make_model()
    expected = gradients(model, tokens)  # without the operator: each call allocates
    pool = request.getfixturevalue("pool")
    assert not buffers(pool)
    model.zero_grad()
    output = model(tokens).logits
    (buffer,) = buffers(pool)
    assert buffer.numel() == 96 * 64
    buffer.fill_(torch.nan)
    output.square().sum().backward()
    (same,) = buffers(pool)
    assert same.data_ptr() == buffer.data_ptr()
    for name, gradient in expected.items():
        assert torch.equal(model.get_parameter(name).grad, gradient)


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


def test_layers_of_other_dtypes_have_their_own(make_model, tokens, pool):
    make_model()(tokens)
    make_model(torch.bfloat16)(tokens)
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes' own kernel for it is CUDA's")
def test_the_gpus_kernel_fills_the_buffer(monkeypatch):
    pool = ScratchPool()
    monkeypatch.setattr(module, "_SCRATCH", pool)
    layer = bnb.nn.Linear4bit(64, 96, bias=False, quant_type="nf4").cuda()
    expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    for _ in range(2):
        with module.dequantized(Bnb4bitBackend(), layer) as weight:
            assert torch.equal(weight, expected)
            assert len(buffers(pool)) == 0
    assert [buffer.data_ptr() for buffer in buffers(pool)] == [weight.data_ptr()]
