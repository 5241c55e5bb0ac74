"""Every kind of base: an adapter is loaded as it was saved, and a merge is undone exactly."""

import pytest
import torch
from adapted import close, config, layer_list, logits
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from tiny_experts import config as expert_config
from tiny_experts import tiny_experts
from tiny_models import tiny_gpt2, tiny_llama

from smoa_kernels.definition.block_rule import BlockRule
from smoa_kernels.peft import Experts, SMoALayer

LINEAR = {"llama": tiny_llama, "gpt2": tiny_gpt2}
EXPERTS = ("qwen3_moe", "mixtral", "gpt_oss", "nemotron_h")
QUANTISED = ("nf4", "torchao int8")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {F32: 1e-5, F16: 5e-3, BF16: 4e-2}


@pytest.fixture
def make(request):
    """A function that makes the base named by the test's `kind`, the same each time."""
    kind = request.getfixturevalue("kind")
    if kind in LINEAR:
        return LINEAR[kind]
    if kind in EXPERTS:
        return lambda: tiny_experts(kind)
    from quantized_bases import KINDS, load  # skips if the extra is not installed

    folder = request.getfixturevalue("quantizable")
    return lambda: load(folder, KINDS[kind])


def adapt(model, kind, **settings):
    torch.manual_seed(3)
    if kind in EXPERTS:
        return get_peft_model(model, expert_config(model, **settings)).eval()
    return get_peft_model(model, config(model, smoa_alpha=1.0, **settings)).eval()


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
        assert torch.equal(one.smoa_blocks["default"], other.smoa_blocks["again"])
    # The labels decide, whatever the configuration says; granules are recognised from them.
    different = adapt(make(), kind, block_order="contiguous" if order == "random" else "random", granule=1)
    logits(different, tokens)  # its index tensors exist before the other labels arrive
    set_peft_model_state_dict(different, get_peft_model_state_dict(model))
    assert torch.equal(logits(different, tokens), expected)


@pytest.mark.numerical
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, dtype) for kind in LINEAR for dtype in TOLERANCE), *((kind, F32) for kind in EXPERTS)],
)
def test_a_merge_keeps_the_outputs_and_is_undone_exactly(kind, dtype, make, tokens):
    base = make().to(dtype)
    plain = logits(base, tokens)
    model = adapt(base, kind)
    expected, layers = logits(model, tokens), layer_list(model)
    before = [layer._stored_weight().clone() for layer in layers]
    model.merge_adapter(safe_merge=True)
    close(logits(model, tokens).float(), expected.float(), TOLERANCE[dtype])
    model.unmerge_adapter()
    assert all(map(torch.equal, (layer._stored_weight() for layer in layers), before))
    assert torch.equal(logits(model, tokens), expected)
    model.merge_adapter()
    with torch.no_grad(), model.disable_adapter():  # this unmerges
        assert torch.equal(logits(model, tokens), plain)
    merged = model.merge_and_unload()
    assert type(merged) is type(make())
    assert not any(isinstance(module, (Experts, SMoALayer)) for module in merged.modules())
    close(logits(merged, tokens).float(), expected.float(), TOLERANCE[dtype])


def test_a_tied_weight(tokens, tmp_path):
    """An output layer that shares the embedding's weight: merging changes both, unmerging restores both."""

    def base():
        return tiny_llama(tie_word_embeddings=True)

    model = adapt(base(), "llama", target_modules=["lm_head", "q_proj"], granule=8)
    embedding, head = model.get_input_embeddings(), model.base_model.model.lm_head
    assert head.base_layer.weight is embedding.weight
    before, expected = embedding.weight.clone(), logits(model, tokens)
    model.merge_adapter()
    close(head.base_layer.weight, before + head.get_delta_weight("default"))
    assert embedding.weight is head.base_layer.weight
    model.unmerge_adapter()
    assert torch.equal(embedding.weight, before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, strict_base=True).eval()
    assert torch.equal(logits(loaded, tokens), expected)
