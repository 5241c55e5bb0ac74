"""Several adapters in one model: active at once, in a mixed batch, and in weighted sums."""

from collections import OrderedDict

import pytest
import torch
from adapted import close, config, layers, logits
from peft import PeftModel, get_peft_model
from tiny_models import tiny_t5
from torch import nn
from transformers import GenerationConfig

from smoa_kernels.definition.packed import padding_masks
from smoa_kernels.peft import SMoAConfig

pytestmark = pytest.mark.numerical

MIXES = {
    "agree": ({"r": 6}, {"r": 4, "smoa_alpha": 2}),
    "uneven": ({}, {"r": 7, "block_ranks": [0, 4, 3]}),
    "differ": ({"block_order": "contiguous"}, {"r": 4, "num_blocks": 2, "granule": 8}),
}


def two_adapters(model, first, second):
    """Adapters that change the model's outputs a little."""
    first, second = (config(model, **{"smoa_alpha": 0.5, **settings}) for settings in (first, second))
    model = get_peft_model(model, first, adapter_name="one")
    model.add_adapter("two", second)
    return model.eval()


def activate(model, *names):
    model.base_model.set_adapter(list(names))


@pytest.fixture(params=MIXES)
def mix(request):
    return request.param


# Several active adapters


def test_adapters_with_different_dropout_are_each_dropped(llama):
    model = two_adapters(llama(), {"smoa_dropout": 0.5}, {})
    activate(model, "one", "two")
    layer = next(iter(layers(model).values())).train()
    x = torch.randn(4000, layer.in_features)[:1].expand(4000, -1)
    mean, expected = layer(x).mean(0), layer.eval()(x[0])
    assert (mean - expected).norm() < 0.1 * (expected - layer.base_layer(x[0])).norm()


@pytest.mark.parametrize("names", [["default"], ["default", "other"]])
def test_labels_that_fully_shard_moves_in_place_bring_their_blocks_along(llama, tokens, names):
    """Here the meta device stands for the one on which blocks were left."""
    model = get_peft_model(llama(), config(backend="eager")).eval()
    for name in names[1:]:
        model.add_adapter(name, config(r=4, num_blocks=2, backend="eager"))
    model.base_model.set_adapter(names)
    expected = logits(model, tokens)
    for layer in layers(model).values():
        for adapter in layer.smoa.values():
            adapter.share(adapter.partition.to("meta"))
        layer._single_block = layer._single_block and layer._single_block.to("meta")
    assert torch.equal(logits(model, tokens), expected)


def test_padding_may_hold_anything():
    of_one_layer = ({"target_modules": ["0"], **settings} for settings in MIXES["uneven"])
    model = two_adapters(nn.Sequential(nn.Linear(12, 9)), *of_one_layer)
    activate(model, "one", "two")
    layer, x = model.base_model.model[0], torch.randn(4, 12)
    expected = layer(x)
    for name in ("one", "two"):
        factors = layer.smoa[name].A.data, layer.smoa[name].B.data
        masks = padding_masks(layer.partition(name), layer.ranks(name), len(factors[0]))
        for factor, mask in zip(factors, masks, strict=True):
            assert not mask.all()
            factor[~mask] = torch.nan
    assert torch.equal(layer(x), expected)
    layer(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("order", [["one", "two"], ["two", "one"]])
def test_merging_several_adapters(make_model, tokens, mix, order):
    model = two_adapters(make_model(), *MIXES[mix])
    before = {name: layer.base_layer.weight.clone() for name, layer in layers(model).items()}
    activate(model, "one", "two")
    expected = logits(model, tokens)
    model.merge_adapter(adapter_names=order[:1])
    with pytest.warns(UserWarning, match="Already following adapters were merged"):
        model.merge_adapter(adapter_names=order)
    assert all(layer.merged_adapters == order for layer in layers(model).values())
    close(logits(model, tokens), expected)
    for layer in layers(model).values():  # ΔW uses W0, not the merged weight
        stored = layer._stored_base.to(tokens.device)
        assert layer.base_weight().equal(stored.T if layer.fan_in_fan_out else stored)
    model.unmerge_adapter()
    for name, layer in layers(model).items():
        assert torch.equal(layer.base_layer.weight, before[name])


# Mixed batches


def test_trls_reference_is_a_copy(folder, make_model, tokens):
    """TRL adds "ref" with the configuration of "default", whose blocks it takes, and copies the factors."""
    saved, expected = folder
    model = PeftModel.from_pretrained(make_model(), saved, is_trainable=True).eval()
    for name in ("ref", "other"):
        model.add_adapter(name, model.peft_config["default"])
    for name, parameter in model.named_parameters():  # as TRL does
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    with torch.no_grad():
        for layer in layers(model).values():
            layer.smoa["default"].B.zero_()
        model.set_adapter("ref")
        assert torch.equal(logits(model, tokens), expected)
        model.set_adapter("other")
        assert not torch.allclose(logits(model, tokens), expected, atol=1e-2)


def test_each_sample_meets_its_own_adapter(make_model, tokens, mix):
    model = two_adapters(make_model(), *MIXES[mix])
    names = ["two", "__base__", "one"]
    with model.disable_adapter():
        base = logits(model, tokens)
    expected = {"__base__": base}
    for name in ("one", "two"):
        activate(model, name)
        expected[name] = logits(model, tokens)
    output = logits(model, tokens, adapter_names=names)
    for i, name in enumerate(names):
        close(output[i], expected[name][i])


def test_mixed_batch_in_generation_with_beams(make_model, tokens):
    model = two_adapters(make_model(), *MIXES["agree"])
    generation = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(tokens)
    names = ["one", "two", "__base__"]
    mixed = model.generate(input_ids=tokens, attention_mask=mask, adapter_names=names, **generation)
    for i, name in enumerate(names[:2]):
        activate(model, name)
        alone = model.generate(input_ids=tokens[i : i + 1], attention_mask=mask[:1], **generation)
        assert torch.equal(mixed[i, : alone.shape[1]], alone[0])


@pytest.mark.parametrize(
    "asked",
    [
        {"num_beams": 2},
        {"generation_config": GenerationConfig(num_beams=2)},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    ],
    ids=["beams", "generation_config", "results"],
)
def test_mixed_batch_in_generation_with_an_encoder(tokens, asked):
    """Samples are repeated in the decoder alone, for their beams or their results."""
    targets = {"target_modules": ["q", "v", "wo"], "smoa_alpha": 20}
    model = two_adapters(tiny_t5(), targets, targets)
    names, asked = ["one", "two", "__base__"], {"max_new_tokens": 4, "no_repeat_ngram_size": 1, **asked}
    mixed = model.generate(input_ids=tokens, adapter_names=names, **asked).chunk(3)
    assert not torch.equal(*mixed[:2])
    for i, name in enumerate(names[:2]):
        activate(model, name)
        alone = model.generate(input_ids=tokens[i : i + 1], **asked)
        assert torch.equal(mixed[i][:, : alone.shape[1]], alone)


def test_mixed_batch_bad_input(llama, tokens):
    model = two_adapters(llama(), *MIXES["agree"])
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        logits(model, tokens, adapter_names=["one"])
    with pytest.raises(ValueError, match=r"non-existing adapter.*: three"):
        logits(model, tokens, adapter_names=["one", "two", "three"])
    with pytest.raises(ValueError, match="training mode"):
        logits(model.train(), tokens, adapter_names=["one", "two", "one"])
    model.eval()
    layer = next(iter(layers(model).values()))
    assert layer(torch.ones(0, 7, layer.in_features), adapter_names=[]).shape == (0, 7, layer.out_features)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        logits(model, tokens, adapter_names=["one", "two", "one"])
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]


# Weighted adapters


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, -1.3]])
def test_concatenation_is_the_weighted_sum(make_model, tokens, mix, weights, tmp_path):
    model = two_adapters(make_model(), *MIXES[mix])
    model.add_weighted_adapter(["one", "two"], weights, "both")
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith(".both"))
    for layer in layers(model).values():
        first, second = map(layer.get_delta_weight, ("one", "two"))
        expected = weights[0] * first + weights[1] * second
        close(layer.get_delta_weight("both"), expected)
    activate(model, "both")
    expected = logits(model, tokens)
    if weights == [1.0, 1.0]:
        activate(model, "one", "two")
        close(logits(model, tokens), expected)
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(make_model(), tmp_path / "both", strict_base=True).eval()
    close(logits(loaded, tokens), expected, 1e-6)


FURTHER = {
    "other ranks": (
        {"r": 4, "rank_pattern": {"q_proj": 3}, "num_blocks_pattern": {"layers.1.mlp.up_proj": 5}},
        {"r": 6, "target_modules": ["q_proj", "up_proj"]},
    ),
    # The second adapter has too many blocks of k_proj for the first one's granules.
    "a granule": (
        {"num_blocks": 2, "granule": 16, "target_modules": ["q_proj"]},
        {"r": 4, "num_blocks": 4, "block_order": "contiguous", "target_modules": ["q_proj", "k_proj"]},
    ),
}


@pytest.mark.parametrize("case", FURTHER)
def test_concatenation_over_layers_that_differ(llama, tokens, tmp_path, case):
    model = two_adapters(llama(), *FURTHER[case])
    model.add_weighted_adapter(["one", "two"], [1.0, 2.0], "both")
    activate(model, "both")
    for layer in layers(model).values():
        parts = [name for name in ("one", "two") if name in layer.smoa]
        assert len(parts) == 2 or layer.partition("both") is layer.partition(parts[0])
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    close(logits(PeftModel.from_pretrained(llama(), tmp_path / "both").eval(), tokens), expected, 1e-6)


def test_concatenation_adapts_no_layer_whose_name_ends_alike(tmp_path):
    def base():
        torch.manual_seed(0)
        inner = nn.Sequential(OrderedDict(lin=nn.Linear(12, 12)))
        return nn.Sequential(OrderedDict(lin=nn.Linear(12, 12), inner=inner))

    config = {"target_modules": "lin", "init_weights": False}
    model = get_peft_model(base(), SMoAConfig(r=4, **config), adapter_name="one").eval()
    model.add_adapter("two", SMoAConfig(r=4, **config))
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "both")
    activate(model, "both")
    assert set(layers(model)) == {"base_model.model.lin"}
    x = torch.randn(3, 12)
    expected = model(x)
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    close(PeftModel.from_pretrained(base(), tmp_path / "both").eval()(x), expected)


def test_linear_combination_sums_the_factors(llama):
    model = two_adapters(llama(), *MIXES["agree"])
    model.add_weighted_adapter(["one"], [-2.0], "scaled", combination_type="linear")
    for layer in layers(model).values():
        close(layer.get_delta_weight("scaled"), -2.0 * layer.get_delta_weight("one"))
    model.add_adapter("three", config(r=6, block_order="contiguous"))
    for other in ("two", "three"):  # with another rank, with other blocks
        with pytest.raises(ValueError, match='same blocks and ranks; use "cat", which is exact'):
            model.add_weighted_adapter(["one", other], [1.0, 1.0], "sum", combination_type="linear")
    assert "sum" not in model.peft_config
