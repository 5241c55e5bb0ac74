"""`merged_weights` works from files to files and gives the same bits as PEFT's `merge_and_unload`."""

import json
from dataclasses import replace
from functools import partial

import pytest
import tiny_experts
import torch
from adapted import close, config, hira_config, loaded, logits, trained
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import tiny_gpt2, tiny_llama, tiny_t5
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5ForConditionalGeneration,
    T5Model,
)

from smoa_kernels.definition.thresholds import round_weight
from smoa_kernels.peft import merge_to_folder, merged_weights

tied_llama = partial(tiny_llama, tie_word_embeddings=True)
biased_llama = partial(tiny_llama, attention_bias=True, mlp_bias=True)


def tiny_llava():
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tiny_llama().config.to_dict(), "model_type": "llama"}
    vision |= {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4}
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)).eval()


F32, BF16 = torch.float32, torch.bfloat16
PATTERNS = {
    "target_modules": ["q_proj", "k_proj", "down_proj"],
    "rank_pattern": {"q_proj": 6},
    "alpha_pattern": {"k_proj": 2.5},
    "num_blocks_pattern": {"down_proj": 4},
    "use_rslora": True,
}
# PEFT corrects `fan_in_fan_out` per layer; a square weight's shape does not show its layout.
QUICK = {
    "plain, sharded": (BF16, tiny_llama, config(target_modules=["o_proj", "up_proj"])),
    "conv1d, sharded": (BF16, tiny_gpt2, config(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "tied, sharded": (BF16, tied_llama, config(modules_to_save=["norm"])),
    # transformers changes the names of its tensors.
    "llava": (F32, tiny_llava, config(target_modules=r".*(language_model|self_attn).*\.(q_proj|v_proj)")),
    "hira": (F32, tiny_llama, hira_config(modules_to_save=["norm"])),
    "hira, sharded": (BF16, tiny_llama, hira_config()),
    "hira, conv1d unsaid": (F32, tiny_gpt2, hira_config(target_modules=["attn.c_proj", "c_attn"])),
}
SLOW = {
    "plain": (F32, tiny_llama, config(smoa_alpha=3.0)),
    "conv1d, unsaid": (F32, tiny_gpt2, config(target_modules=["attn.c_proj"])),
    "biases": (F32, biased_llama, config(bias="all")),
    "own biases": (BF16, biased_llama, config(bias="smoa_only")),
    "head": (BF16, tiny_llama, config(modules_to_save=["lm_head", "norm"])),
    "patterns": (BF16, tiny_llama, config(**PATTERNS)),
    "granules": (BF16, tiny_llama, config(target_modules=["o_proj", "up_proj"], granule=4)),
    "contiguous": (BF16, tiny_llama, config(block_order="contiguous")),
    "random": (BF16, tiny_llama, config(block_order="random", block_ranks=[3, 0, 2])),
    "float64": (torch.float64, tiny_llama, config()),
    "hira, conv1d": (BF16, tiny_gpt2, hira_config(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "hira, said of no conv1d": (F32, tiny_llama, hira_config(fan_in_fan_out=True)),
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])
def test_merges_to_the_same_bits_as_peft(case, tmp_path):
    """Float32 factors over each dtype. Float32 weights that PEFT trains beside them are rounded to the base's dtype.

    PEFT's own merge of HiRA rounds the update before it adds it, in half types to nearest: there its float32 merge is
    rounded by thresholds here.
    """
    dtype, make, method = (QUICK | SLOW)[case]
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    sharded = "sharded" in case
    make().to(dtype).save_pretrained(base, max_shard_size="20KB" if sharded else "5GB")
    assert (base / "model.safetensors").exists() is not sharded
    trained(loaded(base), method, adapter)
    hira = method.peft_type == "HIRA"
    model = loaded(base).float() if hira else loaded(base)
    expected = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    report = merge_to_folder(base, adapter, out)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in base.iterdir())
    merged = loaded(out)
    assert merged.config.tie_word_embeddings == expected.config.tie_word_embeddings
    found, wanted = merged.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        if not hira:
            assert torch.equal(tensor, wanted[name].to(dtype)), name
            continue
        value, swapped = wanted[name], make is tiny_gpt2
        if tensor.ndim == 2:
            value = round_weight(value.T, dtype).T if swapped else round_weight(value, dtype)
        torch.testing.assert_close(tensor, value.to(dtype), rtol=1e-6, atol=1e-8)
    stored = {file.name: load_file(file) for file in base.glob("*.safetensors")}
    written = {file.name: load_file(file) for file in out.glob("*.safetensors")}
    assert written.keys() == stored.keys()
    assert all(written[name].keys() == file.keys() for name, file in stored.items())
    assert report.tensors == sum(map(len, stored.values()))
    changed = [
        not torch.equal(written[file][name], stored[file][name]) for file in stored for name in stored[file]
    ]
    assert report.changed == sum(changed)


def save_head_too(base):
    path = base / "model.safetensors"
    state = load_file(path)
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
@pytest.mark.parametrize(
    ("make", "settings", "edit"),
    [
        (tied_llama, {"target_modules": ["lm_head", "q_proj"]}, None),
        (tied_llama, {"modules_to_save": ["lm_head"]}, None),
        (tied_llama, {"modules_to_save": ["lm_head"]}, save_head_too),
        (tied_llama, {"modules_to_save": ["embed_tokens"]}, None),
        (
            partial(tiny_t5, T5ForConditionalGeneration),
            {"target_modules": ["q"], "modules_to_save": ["lm_head"]},
            None,
        ),
        (partial(tiny_t5, T5Model), {"target_modules": ["q"], "modules_to_save": ["shared"]}, None),
    ],
)
def test_a_change_of_a_tied_parameter_is_refused(make, settings, edit, tmp_path):
    """The merged model would need files that the base lacks; of three and two parameters in T5."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make().save_pretrained(base)
    trained(make(), config(**settings), adapter)
    if edit is not None:
        edit(base)
    with pytest.raises(
        ValueError, match=r"the adapter changes .* ties to each other: merge with .*merge_and_unload"
    ):
        merge_to_folder(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|no longer tied).*:UserWarning")
def test_merge_and_unload_unties_an_adapted_head(tmp_path, tokens):
    """What the refusal names: the embedding keeps its values, in memory and in the saved folder."""
    base = tied_llama()
    model = trained(tied_llama(), config(target_modules=["lm_head", "q_proj"]), tmp_path / "adapter")
    with torch.no_grad():
        expected = logits(model, tokens)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "out")
    for each in (merged, loaded(tmp_path / "out")):
        assert not each.config.tie_word_embeddings
        assert torch.equal(each.get_input_embeddings().weight, base.get_input_embeddings().weight)
        with torch.no_grad():
            close(logits(each, tokens), expected)


def test_other_dtypes_are_those_of_a_base_in_that_dtype(folders, tmp_path):
    """To bfloat16: the bits of a bfloat16 base's merge. To float32: the bfloat16 merge before its rounding."""
    base, adapter = folders
    merge_to_folder(base, adapter, tmp_path / "out", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    found = loaded(tmp_path / "out").state_dict()

    tiny_llama().bfloat16().save_pretrained(tmp_path / "half")
    wide = dict(merged_weights(tmp_path / "half", adapter, dtype=torch.float32))
    for name, tensor in merged_weights(tmp_path / "half", adapter):
        assert torch.equal(found[name], tensor)
        rounded = wide[name].bfloat16() if tensor.ndim == 1 else round_weight(wide[name], torch.bfloat16)
        assert torch.equal(tensor, rounded)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(wide[name], found[name].float())


def test_a_merged_layer_multiplies_by_the_same_weight(folders):
    """The adapted layer's outputs for the unit vectors are W_eff itself: merging changes no entry of it."""
    base, adapter = folders
    model = PeftModel.from_pretrained(loaded(base).bfloat16(), adapter)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.settings["default"] = replace(layer.settings["default"], backend="eager", algorithm="merged")
    unit = torch.eye(layer.in_features, dtype=torch.bfloat16)
    with torch.no_grad():
        W_eff = layer(unit).T
    layer.merge()
    assert torch.equal(layer.get_base_layer().weight, W_eff)
    assert not torch.equal(W_eff, layer.base_weight())


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in ("mixtral", "gpt_oss") else pytest.param(kind, marks=pytest.mark.slow)
        for kind in tiny_experts.KINDS
    ],
)
def test_experts(kind, tmp_path):
    """Fused in the model; in files fused, transposed, or one tensor per expert, split over shards."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_experts.tiny_experts(kind).bfloat16().save_pretrained(base, max_shard_size="30KB")
    fused = tiny_experts.fused(tiny_experts.tiny_experts(kind))
    settings = {"target_parameters": fused, "target_modules": ["q_proj"], "block_order": "contiguous"}
    trained(loaded(base), config(**settings), adapter)
    expected = PeftModel.from_pretrained(loaded(base), adapter).merge_and_unload().state_dict()
    report = merge_to_folder(base, adapter, tmp_path / "out")
    stored = {name for file in base.glob("*.safetensors") for name in load_file(file)}
    assert stored == {name for file in (tmp_path / "out").glob("*.safetensors") for name in load_file(file)}
    assert report.tensors == len(stored)
    found, before = loaded(tmp_path / "out").state_dict(), loaded(base).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    changed = [
        name for name in found if name.endswith(tuple(fused)) and not torch.equal(found[name], before[name])
    ]
    assert len(changed) >= len(fused)


def test_bad_arguments(folders):
    with pytest.raises(ValueError, match="dtype must be one of"):
        merged_weights(*folders, dtype=torch.int8)
    with pytest.raises(TypeError, match="adapter"):
        merged_weights(folders[0], 3)
