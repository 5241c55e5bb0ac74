"""Hot-swapping an adapter: the outputs are the new one's, nothing recompiles, mismatches are refused."""

import json

import pytest
import torch
from adapted import CONFIG, WEIGHTS, adapt, edit_weights, layer_list, logits, unchanged
from peft import PeftModel
from tiny_models import tiny_llama
from torch._dynamo.testing import CompileCounter

from smoa_kernels.peft import hotswap


def saved(folder, seed=0, base=None, **settings):
    """A folder with an adapter of random weights."""
    base = tiny_llama() if base is None else base
    torch.manual_seed(seed)
    adapt(base, **{"r": 6, "num_blocks": 2, "smoa_alpha": 1.8, **settings}).save_pretrained(folder)
    return folder


def loaded(folder, base=None):
    return PeftModel.from_pretrained(tiny_llama() if base is None else base, folder).eval()


def one_layer():
    return tiny_llama(num_hidden_layers=1)


@torch.no_grad()
def operands_of(model):
    """The addresses of scaling and indices, by layer."""
    found = [layer.packed("default", layer.base_weight()) for layer in layer_list(model)]
    return [(p.scaling.data_ptr(), p.ranks.data_ptr(), p.partition.row_index.data_ptr()) for p in found]


@pytest.fixture
def pair(tmp_path):
    """Two adapters of one shape with different factors, scaling and dropout."""
    first = saved(tmp_path / "first")
    return first, saved(tmp_path / "second", 1, smoa_alpha=3.0, smoa_dropout=0.25)


@pytest.mark.numerical
@pytest.mark.parametrize("order", ["random", pytest.param("spectral", marks=pytest.mark.slow)])
def test_a_compiled_model_gives_the_new_adapters_output_and_compiles_nothing(tmp_path, tokens, order):
    folders = [  # random blocks depend on the seed, spectral ones do not
        saved(tmp_path / str(seed), seed, one_layer(), block_order=order, block_seed=seed, smoa_alpha=alpha)
        for seed, alpha in enumerate([1.8, 3.0])
    ]
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(loaded(folders[0], one_layer()), backend=counter, fullgraph=True)
    with torch.no_grad():
        outputs = [logits(compiled, tokens)]
        with torch._dynamo.config.patch(error_on_recompile=True):
            for folder in (folders[1], folders[0]):
                hotswap(compiled, folder)
                outputs.append(logits(compiled, tokens))
        expected = [logits(loaded(folder, one_layer()), tokens) for folder in (*folders, folders[0])]
    assert counter.frame_count == 1
    for ours, reference in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-2)


@pytest.mark.numerical
def test_all_that_a_layer_holds_is_exchanged(pair, tmp_path, tokens):
    first, second = pair
    model, expected = loaded(first), loaded(second)
    factors = [p.data_ptr() for p in model.parameters()]
    operands = operands_of(model)
    hotswap(model, second)
    assert [p.data_ptr() for p in model.parameters()] == factors
    assert operands_of(model) == operands  # a CUDA graph captured before reads these
    assert torch.equal(logits(model, tokens), logits(expected, tokens))
    for ours, reference in zip(layer_list(model), layer_list(expected), strict=True):
        assert ours.scaling == reference.scaling
        dropout, wanted = (each.settings["default"].smoa_dropout for each in (ours, reference))
        assert dropout == wanted
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (second / WEIGHTS).read_bytes()
    ours, reference = (json.loads((folder / CONFIG).read_text()) for folder in (tmp_path / "again", second))
    for values in (ours, reference):
        values["target_modules"].sort()  # a set
    assert ours == reference


@pytest.mark.numerical
def test_another_adapter_that_shared_its_blocks_keeps_them(tmp_path, tokens):
    folders = [saved(tmp_path / str(seed), block_order="random", block_seed=seed) for seed in (1, 2)]
    model = loaded(folders[0])
    model.load_adapter(folders[0], "other")
    before = logits(model, tokens)
    hotswap(model, folders[1])
    changed = logits(model, tokens)
    model.set_adapter("other")
    assert torch.equal(logits(model, tokens), before)
    assert torch.equal(changed, logits(loaded(folders[1]), tokens))


@pytest.mark.numerical
def test_one_exchanged_in_inference_mode_can_be_trained(tmp_path, tokens):
    """Labels, ranks and scaling created in inference mode cannot be saved for backward."""
    folders = [saved(tmp_path / str(seed), block_order="random", block_seed=seed) for seed in (1, 2)]
    model = PeftModel.from_pretrained(tiny_llama(), folders[0], is_trainable=True)
    with torch.inference_mode():
        hotswap(model, folders[1])
    logits(model, tokens).square().mean().backward()
    assert all(layer.smoa["default"].B.grad.any() for layer in layer_list(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 4}, r"size mismatch for .*A: the layer takes shape \(3, 32\), got \(2, 32\)"),
        ({"num_blocks": 3}, "size mismatch for .*A"),
        ({"block_order": "contiguous"}, "block sizes, granularity and contiguity must be the same"),
        ({"target_modules": ["q_proj"]}, "k_proj: the adapter lacks A, B, row_block"),
        ({"base": {"num_hidden_layers": 3}}, "no place for 49 tensors of the adapter, for one .*layers.2"),
        ({"modules_to_save": ["lm_head"]}, "bias and modules_to_save: .*lm_head.weight"),
        ({"base": {"hidden_size": 64}}, "size mismatch for .*q_proj.A"),
    ],
)
def test_another_shape_or_base_is_refused_by_name(pair, tmp_path, settings, message):
    settings = dict(settings)
    folder = saved(tmp_path / "misfit", base=tiny_llama(**settings.pop("base", {})), **settings)
    refused(pair[0], folder, message)


def test_another_dtype_and_other_ranks_of_blocks_are_refused(pair, tmp_path):
    def edit(state):
        last = [key for key in state if "smoa.A" in key][-1]
        state[last] = state[last].half()

    edit_weights(pair[1], edit)
    refused(*pair, "dtype must be the same, got .*float16")
    folders = [
        saved(tmp_path / str(ranks), num_blocks=3, block_ranks=ranks) for ranks in ([3, 2, 1], [3, 1, 2])
    ]
    refused(*folders, r"block_ranks must be the same, got \[3, 1, 2\] in the folder and \[3, 2, 1\]")


def refused(first, folder, message):
    model = loaded(first)

    def scalings():
        return [layer.packed("default", layer.base_weight()).scaling.item() for layer in layer_list(model)]

    before = scalings()
    with unchanged(model), pytest.raises((ValueError, FileNotFoundError), match=message):
        hotswap(model, folder)
    assert scalings() == before


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_biases_and_modules_of_the_old_adapter_are_refused_too(pair, tmp_path, settings):
    refused(saved(tmp_path / "old", **settings), pair[1], "bias and modules_to_save")


def test_a_merged_adapter_and_an_unknown_name_are_refused(pair):
    model = loaded(pair[0])
    with pytest.raises(ValueError, match="adapter_name must name an SMoA adapter of the model, got 'other'"):
        hotswap(model, pair[1], "other")
    model.merge_adapter()
    with pytest.raises(ValueError, match="the adapter is merged: unmerge it first"):
        hotswap(model, pair[1])
