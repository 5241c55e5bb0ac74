"""Other block orders and granules: the configuration's checks; these orders compute no spectrum."""

import pytest
import torch
from adapted import adapt, close, config, layers, logits
from peft import PeftModel, get_peft_model

from smoa_kernels.definition import spectral_order
from smoa_kernels.definition.block_rule import BlockRule
from smoa_kernels.peft import SMoAConfig


@pytest.fixture
def no_spectra(monkeypatch):
    def never(*_):
        raise AssertionError("a spectrum was computed")

    monkeypatch.setattr(spectral_order, "spectral_centroids", never)


@pytest.mark.usefixtures("no_spectra")
@pytest.mark.parametrize("order", ["contiguous", "random"])
def test_no_spectrum_is_computed_and_layers_of_one_shape_share_their_blocks(make_model, order):
    model = adapt(make_model(), block_order=order, granule=4, block_seed=7)
    found = {}
    for layer in layers(model).values():
        shape = layer.out_features, layer.in_features
        partition = layer.partition("default")
        assert partition == BlockRule(3, order, 4, 7).of_shape(shape, "cpu")
        assert partition.granularity % 4 == 0
        assert found.setdefault(shape, partition) is partition


def test_adapters_share_blocks_where_their_rules_agree(llama, no_spectra):
    model = adapt(llama(), target_modules=["q_proj"], block_order="random", block_seed=1)
    for name, settings in {
        "same": {"block_order": "random", "block_seed": 1},
        "seed": {"block_order": "random", "block_seed": 2},
        "order": {"block_order": "contiguous"},
    }.items():
        model.add_adapter(name, config(target_modules=["q_proj"], **settings))
    layer = next(iter(layers(model).values()))
    first = layer.partition("default")
    assert layer.partition("same") is first
    assert layer.partition("seed") != first
    assert layer.partition("order").is_contiguous


def test_a_tied_weight(llama, tokens, tmp_path):
    """An output layer that shares the embedding's weight: merging changes both, unmerging restores both."""

    def base():
        return llama(tie_word_embeddings=True)

    model = adapt(base(), target_modules=["lm_head", "q_proj"], granule=8)
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


def test_a_granule_that_leaves_too_few_is_refused_and_nothing_changes(llama):
    model = llama()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(
        ValueError, match=r"q_proj: granule must leave at least num_blocks=3 granules .* a layer"
    ):
        get_peft_model(model, SMoAConfig(num_blocks=3, granule=16, target_modules=["q_proj"]))
    assert [name for name, _ in model.named_modules()] == before
