"""Interrupted saves, and the contents of a saved file."""

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from adapted import CONFIG, WEIGHTS, adapt, config, contents, layers, logits
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from smoa_kernels.adapter_folder.writing import replacing
from smoa_kernels.peft import SMoAConfig

ROOT = Path(__file__).resolve().parents[2]

# Saving


def torn(tensors, filename, metadata=None):
    Path(filename).write_bytes(b"half")
    raise KeyboardInterrupt


def stopped(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("patterns", "name", "rank"),
    [
        ({"q_proj": 1, "layers.0.q_proj": 2}, "layers.0.q_proj", 1),  # the first match
        ({"layers.0.q_proj": 2, "q_proj": 1}, "layers.0.q_proj", 2),
        ({"proj": 1}, "layers.0.q_proj", 8),  # not a whole part of the name
        ({"^q_proj": 1}, "layers.0.q_proj", 8),
        ({r"layers\.\d+\.(q|k)_proj": 3}, "model.layers.17.k_proj", 3),
        ({"a|b": 3}, "x.b", 3),
        ({"experts[0]": 5}, "experts[0]", 5),  # the exact name
    ],
)
def test_patterns_match_as_pefts_do(patterns, name, rank):
    assert patterns.get(get_pattern_key(patterns.keys(), name), 8) == rank
    assert SMoAConfig(r=8, rank_pattern=patterns).for_layer(name).r == rank


def added(model, **settings):
    model.add_adapter(SMoAConfig(**{"r": 4, "init_weights": False, **settings}))
    return model


@pytest.mark.parametrize(
    ("make", "call", "interrupted"),
    [
        (adapt, "peft.peft_model.safe_save_file", torn),
        (adapt, "smoa_kernels.peft.SMoAConfig.save_pretrained", stopped),  # the weights are already written
        (adapt, "json.dumps", stopped),
        (added, "transformers.modeling_utils.safe_save_file", torn),
        (added, "json.dumps", stopped),
        (
            lambda _, r=4: SMoAConfig(r=r),
            "json.dumps",
            stopped,
        ),  # a configuration alone; PEFT has opened the file
    ],
)
@pytest.mark.usefixtures("transformers_adapters")
def test_a_save_that_is_interrupted_leaves_the_old_adapter(
    llama, tmp_path, monkeypatch, make, call, interrupted
):
    make(llama()).save_pretrained(tmp_path)
    before = contents(tmp_path)
    assert CONFIG in before
    model = make(llama(), r=8)
    with monkeypatch.context() as writing:
        writing.setattr(call, interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(tmp_path)
    assert contents(tmp_path) == before
    model.save_pretrained(tmp_path)
    assert set(contents(tmp_path)) == set(before)
    assert SMoAConfig.from_pretrained(tmp_path).r == 8


def test_a_save_keeps_other_files_of_the_folder(llama, tmp_path):
    model = adapt(llama())
    model.add_adapter("other", SMoAConfig(r=4))
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text() + "\nTrained on a Tuesday.\n"
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path)
    assert "Trained on a Tuesday." in (tmp_path / "README.md").read_text()
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"README.md", CONFIG, WEIGHTS, "notes.txt", "other"}
    assert PeftModel.from_pretrained(llama(), tmp_path / "other").peft_config["default"].r == 4


def test_a_folder_that_another_process_makes_meanwhile(tmp_path):
    new = tmp_path / "new"
    with replacing(new) as scratch:
        new.mkdir()
        (new / "theirs").write_text("other")
        (scratch / "ours").write_text("own")
    assert contents(new) == {"theirs": b"other", "ours": b"own"}
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_checkpointed_layer_is_saved(llama, tokens, tmp_path):
    """accelerate's `fsdp_activation_checkpointing` wraps layers so; PEFT then writes no tensor of LoRA's."""
    model = adapt(llama())
    expected = logits(model, tokens)
    decoder = model.get_submodule("base_model.model.model.layers")
    decoder[0] = checkpoint_wrapper(decoder[0])
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path), tokens), expected)


def test_an_adapter_is_loaded_over_one_where_the_base_has_another_precision(llama, tokens, tmp_path):
    """The rms of W0, and so the scale for LoRA's learning rate, differs in its last digits."""
    adapt(llama(), use_lora_rate=True).save_pretrained(tmp_path)
    model = adapt(llama().bfloat16(), use_lora_rate=True)
    expected = logits(PeftModel.from_pretrained(llama().bfloat16(), tmp_path), tokens)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model.eval(), tokens), expected)


def test_an_adapter_of_another_scale_is_not_loaded_over_one(llama, tokens, tmp_path):
    """The next save would write this configuration's s beside the file's factors."""
    adapt(llama(), smoa_alpha=32).save_pretrained(tmp_path)
    model = adapt(llama(), smoa_alpha=8)
    expected = logits(model, tokens)
    with pytest.raises(
        ValueError, match=r"q_proj: s is 6.4 in the file and 1.6 by the model's configuration"
    ):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model, tokens), expected)
    model.load_adapter(tmp_path, "other")
    assert {layer.scaling["other"] for layer in layers(model).values()} == {6.4}


def test_other_methods_files_are_written_as_before(llama, tmp_path):
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(llama(), tmp_path).peft_type == "LORA"


@pytest.mark.numerical
@pytest.mark.usefixtures("transformers_adapters")
def test_transformers_own_adapter_methods(make_model, tokens, tmp_path, monkeypatch):
    """They bypass PEFT's tuner."""
    model = make_model()
    model.add_adapter(config(model))
    model.eval()
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path)
    loaded = make_model()
    with monkeypatch.context() as loading:  # no spectral order is computed
        loading.delattr("smoa_kernels.definition.spectral_order.spectral_centroids")
        loaded.load_adapter(tmp_path)
        logits(loaded, tokens)
    assert torch.equal(logits(loaded.eval(), tokens), expected)
    loaded.disable_adapters()
    assert torch.equal(logits(loaded, tokens), logits(make_model(), tokens))


def test_an_adapter_that_awaits_its_weights_is_copied_and_pickled(make_model, folder):
    """What a failed load restores is the copy, not the original."""
    model = get_peft_model(make_model(), SMoAConfig.from_pretrained(str(folder[0])))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        (snapshot,) = other.base_model.snapshots.values()
        assert snapshot.model is other.base_model.model


@pytest.mark.numerical
def test_a_layer_that_was_used_takes_other_labels():
    base, x = nn.Linear(12, 9), torch.randn(4, 12)
    settings = {"target_modules": ["0"], "block_order": "random", "init_weights": False}
    models = [adapt(nn.Sequential(copy.deepcopy(base)), block_seed=seed, **settings) for seed in (1, 2, 3)]
    outputs = [model(x) for model in models]
    models[0].load_state_dict(models[1].state_dict())
    assert torch.equal(models[0](x), outputs[1])
    set_peft_model_state_dict(models[0], get_peft_model_state_dict(models[2]))
    assert torch.equal(models[0](x), outputs[2])


def test_a_pickle_is_neither_written_nor_read(make_model, folder):
    folder, _ = folder
    before = contents(folder)
    model = adapt(make_model())
    for place in (folder, folder.parent / "new"):
        with pytest.raises(ValueError, match="safe_serialization must be True"):
            model.save_pretrained(place, safe_serialization=False)
    assert contents(folder) == before
    assert not (folder.parent / "new").exists()


def test_ten_lines_of_safetensors_apply_an_adapter(llama, tokens, tmp_path):
    """As docs/peft.md shows them."""
    base = llama()
    model = adapt(llama(), init_weights=False, num_blocks=3).eval()
    model.save_pretrained(tmp_path)
    page = (ROOT / "docs" / "peft.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (apply,) = (block for block in blocks if "load_file" in block)
    exec(apply, {"folder": str(tmp_path), "model": base})
    torch.testing.assert_close(logits(base.eval(), tokens), logits(model, tokens), rtol=1e-4, atol=1e-5)


SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}


@pytest.mark.parametrize(("r", "header"), [(8, 0.045), (32, 0.012)])
def test_size_of_the_file(llama, tmp_path, r, header):
    """The limits for a layer of SmolLM2-135M: the trained bytes and a byte for each label, plus safetensors' header."""
    model = adapt(llama(num_hidden_layers=1, **SMOLLM2), r=r, num_blocks=2)
    model.save_pretrained(tmp_path)
    size = (tmp_path / WEIGHTS).stat().st_size
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    labels = sum(layer.in_features + layer.out_features for layer in layers(model).values())
    assert len(layers(model)) == 7
    assert trained + labels < size < (1 + header) * (trained + labels)
