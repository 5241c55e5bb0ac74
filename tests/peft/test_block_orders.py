"""Other block orders and granules: the configuration's checks; these orders compute no spectrum."""

import json

import pytest
import torch
from adapted import CONFIG, adapt, close, config, edit_config, layers, logits, nudge
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from smoa_kernels.definition import spectral_order
from smoa_kernels.definition.block_rule import BlockRule
from smoa_kernels.peft import SMoAConfig

ORDERS = ["contiguous", "random"]


@pytest.fixture
def no_spectra(monkeypatch):
    def never(*_):
        raise AssertionError("a spectrum was computed")

    monkeypatch.setattr(spectral_order, "spectral_centroids", never)


@pytest.mark.usefixtures("no_spectra")
@pytest.mark.parametrize("order", ORDERS)
def test_no_spectrum_is_computed(make_model, tokens, tmp_path, monkeypatch, order):
    """Random blocks of a loaded adapter are not drawn again either."""
    torch.manual_seed(3)
    model = adapt(make_model(), block_order=order, granule=4, block_seed=7)
    nudge(model)
    for layer in layers(model).values():
        shape = layer.out_features, layer.in_features
        assert layer.partition("default") == BlockRule(3, order, 4, 7).of_shape(shape, "cpu")
        assert layer.partition("default").granularity % 4 == 0
    shared = {
        (layer.out_features, layer.in_features): layer.partition("default")
        for layer in layers(model).values()
    }
    assert len({id(layer.partition("default")) for layer in layers(model).values()}) == len(shared)
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path)

    def drawn(*_, **__):
        raise AssertionError("blocks were made anew")

    with monkeypatch.context() as loading:
        loading.setattr(BlockRule, "of_shape", drawn)
        loaded = PeftModel.from_pretrained(make_model(), tmp_path)
        close(logits(loaded, tokens), expected)
        cheap = PeftModel.from_pretrained(make_model(), tmp_path, low_cpu_mem_usage=True)
        close(logits(cheap, tokens), expected)
        cheap.load_adapter(tmp_path, "again")
        cheap.set_adapter("again")
        close(logits(cheap, tokens), expected)
    assert loaded.peft_config["default"].block_order == order
    for name, layer in layers(loaded).items():
        assert layer.settings["default"].rule == BlockRule(3, order, 4, 7)
        assert layer.partition("default") == layers(model)[name].partition("default")
    other = adapt(make_model(), block_order=order, granule=1, block_seed=8)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    close(logits(other, tokens), expected)
    other.merge_adapter()
    close(logits(other, tokens), expected, 1e-4)


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


def test_patterns_choose_by_layer(llama):
    model = adapt(
        llama(),
        target_modules=["q_proj", "up_proj", "down_proj"],
        block_order="contiguous",
        granule=2,
        block_order_pattern={"up_proj": "spectral"},
        granule_pattern={"down_proj": 4, "up_proj": 8},
    )
    for name, layer in layers(model).items():
        kind = name.rpartition(".")[2]
        expected = {
            "q_proj": BlockRule(3, "contiguous", 2),
            "up_proj": BlockRule(3, "spectral", 8),
            "down_proj": BlockRule(3, "contiguous", 4),
        }[kind]
        assert layer.settings["default"].rule == expected
        assert layer.partition("default") == expected.build(layer.base_weight())


def test_a_folder_from_before_there_were_orders(llama, tokens, tmp_path):
    model = adapt(llama())
    nudge(model)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    new = {"block_order", "granule", "block_seed", "block_order_pattern", "granule_pattern"}
    assert new <= written.keys()
    (tmp_path / CONFIG).write_text(json.dumps({key: written[key] for key in written.keys() - new}))
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert loaded.peft_config["default"].for_layer("").rule == BlockRule(3)
    close(logits(loaded, tokens), logits(model, tokens))


@pytest.mark.usefixtures("no_spectra")
@pytest.mark.parametrize("order", ORDERS)
def test_labels_count_whatever_the_configuration_says_later(llama, tokens, tmp_path, order):
    """Granules are recognised from the labels, in a file and in a model whose configuration says otherwise."""
    model = adapt(llama(), target_modules=["q_proj"], block_order=order, granule=4)
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, block_order="spectral", granule=1)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    other = adapt(llama(), target_modules=["q_proj"], block_order=ORDERS[order == "contiguous"], granule=8)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    for found in (loaded, other):
        for layer in layers(found).values():
            partition = layer.partition("default")
            assert partition.is_contiguous == (order == "contiguous")
            assert partition.granularity % 4 == 0
        assert torch.equal(logits(found, tokens), expected)


@pytest.mark.parametrize("settings", [{"block_order": "contiguous"}, {"granule": 8}], ids=str)
def test_a_tied_weight(llama, tokens, tmp_path, settings):
    """An output layer that shares the embedding's weight: merging changes both, unmerging restores both."""

    def base():
        return llama(tie_word_embeddings=True)

    model = adapt(base(), target_modules=["lm_head", "q_proj"], **settings)
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
