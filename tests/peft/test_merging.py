"""`merged_weights` and `merge_to_folder`: bit for bit what PEFT's `merge_and_unload` gives, from files to files."""

import copy
import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import tiny_experts
import torch
from adapted import WEIGHTS, assert_refused, close, edit_weights, logits
from peft import HiraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny_gpt2, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from smoa_kernels.cli import main
from smoa_kernels.peft import SMoAConfig, merge_to_folder, merged_weights
from smoa_kernels.peft.rounding import round_stochastically

HIRA = {"r": 4, "init_weights": False}


def tied_llama():
    return tiny_llama(tie_word_embeddings=True)


def biased_llama():
    return tiny_llama(attention_bias=True, mlp_bias=True)


def trained(model, config, folder):
    """Save an adapter of which every parameter that it trains has moved."""
    model = get_peft_model(model, copy.deepcopy(config))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    model.save_pretrained(folder)
    return model.eval()


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def smoa(**settings):
    return SMoAConfig(**{"r": 4, "target_modules": ["q_proj"], "init_weights": False, **settings})


def hira(**settings):
    return HiraConfig(
        **{"r": 4, "target_modules": ["q_proj", "down_proj"], "init_weights": False, **settings}
    )


@pytest.fixture
def folders(tmp_path):
    """A base and an adapter over it."""
    tiny_llama().save_pretrained(tmp_path / "base")
    trained(tiny_llama(), smoa(target_modules=["q_proj", "down_proj"]), tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


def differing(base, adapter):
    """Names of the merged tensors that are not the base's, bit for bit."""
    stored = load_file(base / "model.safetensors")
    return {n for n, t in merged_weights(base, adapter) if n not in stored or not torch.equal(t, stored[n])}


F32, BF16 = torch.float32, torch.bfloat16
PATTERNS = {
    "target_modules": ["q_proj", "k_proj", "down_proj"],
    "rank_pattern": {"q_proj": 6},
    "alpha_pattern": {"k_proj": 2.5},
    "num_blocks_pattern": {"down_proj": 4},
    "use_rslora": True,
}
CASES = {
    "plain": (F32, tiny_llama, smoa(num_blocks=3, r=5, smoa_alpha=3.0, target_modules="all-linear")),
    "plain, sharded": (BF16, tiny_llama, smoa(target_modules=["o_proj", "up_proj"])),
    "conv1d, sharded": (BF16, tiny_gpt2, smoa(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "conv1d, unsaid": (F32, tiny_gpt2, smoa(target_modules=["attn.c_proj"])),
    "biases": (F32, biased_llama, smoa(bias="all")),
    "own biases": (BF16, biased_llama, smoa(bias="smoa_only")),
    "head": (BF16, tiny_llama, smoa(modules_to_save=["lm_head", "norm"])),
    "tied": (F32, tied_llama, smoa()),
    "tied head, sharded": (BF16, tied_llama, smoa(modules_to_save=["lm_head"])),
    "tied embedding": (BF16, tied_llama, smoa(modules_to_save=["embed_tokens"])),
    "patterns": (BF16, tiny_llama, smoa(**PATTERNS)),
    "granules": (BF16, tiny_llama, smoa(target_modules=["o_proj", "up_proj"], granule=4)),
    "contiguous": (BF16, tiny_llama, smoa(block_order="contiguous")),
    "random": (BF16, tiny_llama, smoa(block_order="random", r=5, num_blocks=3, block_ranks=[3, 0, 2])),
    "float64": (torch.float64, tiny_llama, smoa()),
    "hira": (F32, tiny_llama, hira(modules_to_save=["norm"])),
    "hira, sharded": (BF16, tiny_llama, hira()),
    "hira, conv1d": (BF16, tiny_gpt2, hira(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
}
CASES |= {  # PEFT corrects what the configuration says of a layer, which of a square one no shape shows
    "hira, conv1d unsaid": (F32, tiny_gpt2, hira(target_modules=["attn.c_proj", "c_attn"])),
    "hira, said of no conv1d": (F32, tiny_llama, hira(fan_in_fan_out=True)),
}
SOON = (
    "plain, sharded",
    "conv1d, sharded",
    "tied head, sharded",
    "hira",
    "hira, sharded",
    "hira, conv1d unsaid",
)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
@pytest.mark.parametrize(
    "case", [case if case in SOON else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_bit_for_bit_what_peft_merges(case, tmp_path):
    """Float32 factors over each dtype. What PEFT trains in float32 beside them is rounded to the base's dtype."""
    dtype, make, config = CASES[case]
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    sharded = "sharded" in case
    make().to(dtype).save_pretrained(base, max_shard_size="20KB" if sharded else "5GB")
    assert (base / "model.safetensors").exists() is not sharded
    trained(loaded(base), config, adapter)
    expected = PeftModel.from_pretrained(loaded(base), adapter).merge_and_unload()
    report = merge_to_folder(base, adapter, out, max_shard_size="5GB" if sharded else "20KB")
    assert (out / "model.safetensors").exists() is sharded
    merged = loaded(out)
    assert merged.config.tie_word_embeddings == expected.config.tie_word_embeddings
    found, wanted = merged.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, wanted[name].to(dtype)), name
    assert report.untied == (("lm_head.weight",) if case.startswith("tied ") else ())
    if not sharded:
        assert report.changed == len(differing(base, adapter)) - (case == "tied embedding")


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
def test_a_tied_head_that_is_adapted_is_stored_of_its_own(tmp_path, tokens):
    """PEFT's merge changes the embedding too."""
    tied_llama().save_pretrained(tmp_path / "base")
    trained(tied_llama(), smoa(target_modules=["lm_head", "q_proj"]), tmp_path / "adapter")
    model = PeftModel.from_pretrained(tied_llama(), tmp_path / "adapter").eval()
    report = merge_to_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.untied == ("lm_head.weight",)
    merged = loaded(tmp_path / "out")
    assert torch.equal(merged.get_input_embeddings().weight, tied_llama().get_input_embeddings().weight)
    assert not torch.equal(merged.get_input_embeddings().weight, merged.lm_head.weight)
    with torch.no_grad():
        close(logits(merged, tokens), logits(model, tokens))


def test_a_tied_head_that_the_base_stores_too(tmp_path):
    """Its own values are written, and the configuration no longer ties it."""
    tied_llama().save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    state = load_file(path)
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    trained(tied_llama(), smoa(modules_to_save=["lm_head"]), tmp_path / "adapter")
    assert merge_to_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out").untied == (
        "lm_head.weight",
    )
    merged = loaded(tmp_path / "out")
    assert torch.equal(merged.get_input_embeddings().weight, state["model.embed_tokens.weight"])
    head = load_file(tmp_path / "adapter" / WEIGHTS)["base_model.model.lm_head.weight"]
    assert torch.equal(merged.lm_head.weight, head)


def tiny_llava():
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tiny_llama().config.to_dict(), "model_type": "llama"}
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config={"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **vision},
            text_config=text,
        )
    ).eval()


def tiny_mixtral():
    torch.manual_seed(0)
    config = tiny_llama().config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: getattr(config, name) for name in names}
    return MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2)).eval()


@pytest.mark.parametrize("make", [tiny_llava, tiny_mixtral])
def test_names_that_transformers_changes(make, tmp_path):
    """Llava's layers are stored under other names than the model's; Mixtral's experts are stored one by one."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make().save_pretrained(base)
    targets = r".*(language_model|self_attn).*\.(q_proj|v_proj)"
    trained(make(), smoa(target_modules=targets), adapter)
    expected = PeftModel.from_pretrained(make(), adapter).merge_and_unload().state_dict()
    merge_to_folder(base, adapter, tmp_path / "out")
    assert (
        load_file(tmp_path / "out" / "model.safetensors").keys()
        == load_file(base / "model.safetensors").keys()
    )
    found = type(make()).from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    changed = [name for name, tensor in make().state_dict().items() if not torch.equal(found[name], tensor)]
    assert len(changed) >= 4


def test_other_dtypes_round_once(folders, tmp_path):
    """Float32 to bfloat16: the float32 merge, rounded. bfloat16 to float32: the bfloat16 merge before it is rounded."""
    base, adapter = folders
    exact = dict(merged_weights(base, adapter))
    merge_to_folder(base, adapter, tmp_path / "out", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert all(torch.equal(loaded(tmp_path / "out").state_dict()[n], t.bfloat16()) for n, t in exact.items())

    tiny_llama().bfloat16().save_pretrained(tmp_path / "half")
    wide = dict(merged_weights(tmp_path / "half", adapter, dtype=torch.float32))
    half = dict(merged_weights(tmp_path / "half", adapter))
    assert all(torch.equal(wide[name].bfloat16(), half[name]) for name in half)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(wide[name], half[name].float())


def test_stochastic_rounding(folders, tmp_path):
    """As defined, of what the adapter changes; the same bits in every layout of shards."""
    base, adapter = folders
    names = {name for name, _ in merged_weights(base, adapter) if "q_proj" in name or "down_proj" in name}
    exact, nearest, drawn, other = (
        dict(merged_weights(base, adapter, **settings))
        for settings in (
            {},
            {"dtype": torch.bfloat16},
            {"dtype": torch.bfloat16, "rounding": "stochastic"},
            {"dtype": torch.bfloat16, "rounding": "stochastic", "seed": 1},
        )
    )
    for name, tensor in drawn.items():
        if name in names:
            assert torch.equal(tensor, round_stochastically(exact[name], torch.bfloat16, seed=0, name=name))
            assert not torch.equal(tensor, nearest[name])
            assert not torch.equal(tensor, other[name])
        else:
            assert torch.equal(tensor, nearest[name])
    settings = {"dtype": torch.bfloat16, "rounding": "stochastic"}
    merge_to_folder(base, adapter, tmp_path / "out", max_shard_size="10KB", **settings)
    found = loaded(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in drawn.items())


@pytest.mark.parametrize("method", ["smoa", "hira"])
def test_stochastic_rounding_keeps_small_updates(method, tmp_path):
    """Of an update of a thousandth of bfloat16 weights nearest loses most, stochastic nothing but noise."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_llama(hidden_size=128).bfloat16().save_pretrained(base)
    config = smoa(num_blocks=1) if method == "smoa" else hira(target_modules=["q_proj"])
    trained(loaded(base), config, adapter)
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = load_file(base / "model.safetensors")[name].double()

    def small(state):
        for key in state:
            if key.endswith("_B"):
                A = state[key[:-1] + "A"]
                state[key] *= 1e-3 / (state[key] @ A).square().mean().sqrt()

    edit_weights(adapter, small)
    exact = dict(merged_weights(base, adapter, dtype=torch.float64))[name] - weight

    def survival(rounding):
        change = dict(merged_weights(base, adapter, rounding=rounding))[name].double() - weight
        return float((change * exact).sum() / exact.square().sum())

    assert survival("nearest") < 0.6
    # Noise of a share of some √(last bit / update) ≈ 2 of each element, over 128² of them: 0.02.
    assert abs(survival("stochastic") - 1) < 0.1


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda base, adapter: tiny_llama(seed=1).save_pretrained(base), "trained over another base weight"),
        (lambda base, adapter: tiny_llama(intermediate_size=40).save_pretrained(base), "has shape (32, 40)"),
        (lambda base, adapter: edit_weights(adapter, add("score.weight", 2, 32)), "stores no score.weight"),
        (lambda base, adapter: edit_weights(adapter, add("lm_head.weight", 66, 32)), "If tokens were added"),
        (
            lambda base, adapter: edit_weights(adapter, spoilt),
            "down_proj.weight: the merged tensor holds NaN",
        ),
        (lambda base, adapter: (base / "config.json").unlink(), "there is no config.json"),
        (lambda base, adapter: (base / "model.safetensors").unlink(), "there are no safetensors files"),
        (lambda base, adapter: quantised(base), "is quantised (bitsandbytes): merge into the model"),
        (lambda base, adapter: lora(adapter), "an adapter of the method 'LORA'"),
    ],
)
def test_refused_by_name_and_nothing_is_left(prepare, message, folders, tmp_path, capsys):
    prepare(*folders)
    before = sorted(tmp_path.iterdir())
    assert_refused(
        capsys, lambda *given: main(["merge", *map(str, given)]), message, *folders, tmp_path / "out"
    )
    assert sorted(tmp_path.iterdir()) == before


BFLOAT16 = ["--dtype", "bfloat16"]
STOCHASTIC = [*BFLOAT16, "--rounding", "stochastic"]
BY_CHANCE = {"dtype": torch.bfloat16, "rounding": "stochastic"}


@pytest.mark.parametrize(
    ("options", "without", "settings"),
    [
        (BFLOAT16, [], {"dtype": torch.bfloat16}),
        (STOCHASTIC, BFLOAT16, BY_CHANCE),
        ([*STOCHASTIC, "--seed", "3"], STOCHASTIC, {**BY_CHANCE, "seed": 3}),
        (["--max-shard-size", "20KB"], [], {"max_shard_size": "20KB"}),
    ],
)
def test_options_of_the_command(options, without, settings, folders, tmp_path):
    def merged(name, *given):
        out = tmp_path / name
        assert main(["merge", *map(str, folders), str(out), *given]) == 0
        return files(out)

    def files(folder):
        return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}

    merge_to_folder(*folders, tmp_path / "function", **settings)
    found = merged("command", *options)
    assert found == files(tmp_path / "function")
    assert found != merged("without", *without)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--dtype", "int8", "--dtype must be"),
        ("--rounding", "up", "rounding must be"),
        ("--seed", "-1", "'--seed'"),
        ("--max-shard-size", "20 apples", "max_shard_size must be a size such as '5GB', got '20 apples'"),
    ],
)
def test_bad_options_are_named(option, value, message, folders, tmp_path, capsys):
    given = [*map(str, folders), str(tmp_path / "out"), option, value]
    assert_refused(capsys, lambda *given: main(["merge", *given]), message, *given)
    assert not (tmp_path / "out").exists()


def add(name, *shape):
    return lambda state: state.update({f"base_model.model.{name}": torch.zeros(shape)})


def spoilt(state):
    state["base_model.model.model.layers.1.mlp.down_proj.smoa_B"][0] = torch.nan


def quantised(base):
    path = base / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "bitsandbytes"}})
    )


def lora(adapter):
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter)


def test_ties_that_cannot_be_cut_are_refused(tmp_path):
    sizes = {"vocab_size": 64, "d_model": 32, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes))
    model.save_pretrained(tmp_path / "base")
    trained(model, smoa(target_modules=["q"], modules_to_save=["lm_head"]), tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"the adapter changes lm_head.weight .* they cannot be stored apart"
    ):
        merged_weights(tmp_path / "base", tmp_path / "adapter")


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in ("mixtral", "gpt_oss") else pytest.param(kind, marks=pytest.mark.slow)
        for kind in tiny_experts.KINDS
    ],
)
def test_experts(kind, tmp_path):
    """Fused in the model; in files fused, transposed, or a tensor for each expert, in shards that part them."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_experts.tiny_experts(kind).bfloat16().save_pretrained(base, max_shard_size="30KB")
    fused = tiny_experts.fused(tiny_experts.tiny_experts(kind))
    config = smoa(target_parameters=fused, target_modules=["q_proj"], block_order="contiguous")
    trained(loaded(base), config, adapter)
    expected = PeftModel.from_pretrained(loaded(base), adapter).merge_and_unload().state_dict()
    report = merge_to_folder(base, adapter, tmp_path / "out", max_shard_size="30KB")
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
    # Rounded by the stored tensors' own names, whatever lies beside them.
    drawn = dict(merged_weights(base, adapter, rounding="stochastic"))
    exact = dict(merged_weights(base, adapter, dtype=torch.float32))
    for name in list(drawn)[-3:]:
        assert torch.equal(drawn[name], round_stochastically(exact[name], torch.bfloat16, seed=0, name=name))


def test_another_base_is_refused_by_the_experts_parameter(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_experts.tiny_experts("mixtral", seed=1).save_pretrained(base)
    model = tiny_experts.tiny_experts("mixtral")
    trained(model, smoa(target_parameters=tiny_experts.fused(model), target_modules=[]), adapter)
    with pytest.raises(
        ValueError, match=r"layers.0.mlp.experts.\w+: the adapter was trained over another base"
    ):
        dict(merged_weights(base, adapter))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": torch.int8}, "dtype must be one of"),
        ({"rounding": "up"}, "rounding must be one of nearest, stochastic"),
        ({"seed": -1}, "seed must be an int of at least 0"),
    ],
)
def test_bad_arguments(settings, message, folders):
    with pytest.raises(ValueError, match=message):
        merged_weights(*folders, **settings)
    with pytest.raises(TypeError, match="adapter"):
        merged_weights(folders[0], 3)
    with pytest.raises(ValueError, match="max_shard_size must be a size such as '5GB', got '5XB'"):
        merge_to_folder(*folders, folders[0].parent / "out", max_shard_size="5XB")


def test_what_is_there_is_not_overwritten(folders, tmp_path):
    with pytest.raises(ValueError, match="out must be a new or an empty folder"):
        merge_to_folder(*folders, folders[0])
    assert dict(merged_weights(*folders))  # the base is whole
    (tmp_path / "empty").mkdir()
    merge_to_folder(*folders, tmp_path / "empty")
    assert loaded(tmp_path / "empty")


@pytest.mark.parametrize("at", [0, 7, 21])
def test_interrupted(at, folders, tmp_path):
    """At the first tensor, in between, after the last: nothing is left, not even a hidden folder."""
    before = sorted(tmp_path.iterdir())

    def interrupt(done, total):
        assert total == 21
        if done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_to_folder(*folders, tmp_path / "out", max_shard_size="10KB", progress=interrupt)
    assert sorted(tmp_path.iterdir()) == before


KILLED = """
import os, signal, sys
from smoa_kernels.peft import merge_to_folder
base, adapter, out = sys.argv[1:]
kill = lambda done, total: done == 15 and os.kill(os.getpid(), signal.SIGKILL)
merge_to_folder(base, adapter, out, max_shard_size="10KB", progress=kill)
"""


@pytest.mark.slow
def test_killed(folders, tmp_path):
    """What a killed merge leaves is hidden and no model; the next merge does not mind it."""
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, (*folders, out))], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    (left,) = (path for path in tmp_path.iterdir() if path.name not in ("base", "adapter"))
    assert left.name.startswith(".out.merging-")
    assert list(left.glob("*.safetensors"))
    assert not (left / "config.json").exists()
    merge_to_folder(*folders, out)
    assert loaded(out)


def test_a_failed_write_names_the_place(folders, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("smoa_kernels.peft.merged_folder.save_file", full)
    with pytest.raises(OSError, match=r"cannot merge into .*out, which was not written: .*No space left"):
        merge_to_folder(*folders, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_files_beside_the_weights(folders, tmp_path, capsys):
    base, adapter = folders
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "LICENSE",
        "README.md",
        "pytorch_model.bin",
        ".hidden",
    ):
        (base / name).write_text("base")
    (base / "original").mkdir()
    (base / "original" / "params.json").write_text("base")
    (base / "consolidated.safetensors").write_text("no model")  # transformers reads model.safetensors alone
    assert main(["merge", str(base), str(adapter), str(tmp_path / "one")]) == 0
    assert "21 tensors, 4 of them changed" in capsys.readouterr().out
    assert {path.relative_to(tmp_path / "one").as_posix() for path in (tmp_path / "one").rglob("*.*")} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "chat_template.jinja", "original/params.json"),
    }
    assert (tmp_path / "one" / "LICENSE").exists()
    for name in ("tokenizer_config.json", "chat_template.jinja", "training_args.bin"):
        (adapter / name).write_text("run")
    merge_to_folder(base, adapter, tmp_path / "two")
    two = {path.name: path.read_bytes() for path in (tmp_path / "two").glob("*") if path.is_file()}
    assert two["chat_template.jinja"] == two["tokenizer_config.json"] == b"run"
    assert two["tokenizer.json"] == b"base"
    assert not {"adapter_config.json", "README.md", "training_args.bin"} & set(two)
    modes = {path.stat().st_mode for path in (tmp_path / "two").glob("*.*")}
    assert len(modes) == 1  # safetensors makes files that only their owner reads


def test_a_gguf_of_the_result_reads_back(folders, tmp_path):
    """Written with the `gguf` package's own table of names, as converters write it."""
    gguf = pytest.importorskip("gguf", reason="needs the examples extra")
    merge_to_folder(*folders, tmp_path / "out", dtype=torch.float16, rounding="stochastic")
    weights = {
        name: tensor.numpy() for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items()
    }
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for name, array in weights.items():
        writer.add_tensor(names.get_name(name, (".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(found) == len(weights)
    for name, array in weights.items():
        tensor = found[names.get_name(name, (".weight",))]
        assert np.array_equal(tensor.data.reshape(array.shape), array)


MEASURED = """
import re, sys
from pathlib import Path
import torch
from smoa_kernels.peft import merge_to_folder
def resident(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
base, adapter, out, size = sys.argv[1:]
torch.set_num_threads(1)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before = resident("VmRSS")
merge_to_folder(base, adapter, out, max_shard_size=int(size))
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_a_shard_and_a_layer(tmp_path):
    """In a process of its own: far below the model, which takes eight shards."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "vocab_size": 128}
    model = tiny_llama(**sizes).bfloat16()
    layer = 2 * 2048 * 512
    model.save_pretrained(tmp_path / "base", max_shard_size=8 * layer)
    trained(
        model, smoa(target_modules=["up_proj", "down_proj"], block_order="contiguous"), tmp_path / "adapter"
    )
    arguments = [tmp_path / "base", tmp_path / "adapter", tmp_path / "out", 8 * layer]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, arguments)], check=True, capture_output=True, text=True
    )
    shards = len(list((tmp_path / "out").glob("*.safetensors")))
    assert shards >= 8
    # The layer: W0 as it is stored, W0 and W_eff in float32, W_eff rounded, the sketch's products.
    print("peak over a shard:", int(done.stdout) / (8 * layer))
    assert int(done.stdout) < 8 * layer + 10 * layer + 48 * 2**20


def test_places_that_cannot_be_renamed_to_are_refused_before_the_work(folders, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "link").symlink_to(empty)
    merge_to_folder(*folders, tmp_path / "link")
    assert (empty / "config.json").exists()
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    for refused in (".", other):
        with pytest.raises(ValueError, match="mount point or the working folder"):
            merge_to_folder(*folders, refused)
    assert not list(other.iterdir())


def test_an_adapter_beside_the_base_is_not_taken_along(folders, tmp_path):
    base, adapter = folders
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, base / name)
    merge_to_folder(base, adapter, tmp_path / "out")
    assert not list((tmp_path / "out").glob("adapter*"))
