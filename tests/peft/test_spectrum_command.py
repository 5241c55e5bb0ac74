"""`smoa-kernels spectrum`: numbers equal to those of PEFT's own ΔW, the table, figures, and mistakes in one line."""

import json
import subprocess
import sys
import xml.etree.ElementTree

import pytest
import torch
from adapted import WEIGHTS, assert_refused, edit_config
from peft import HiraConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny_gpt2, tiny_llama

from smoa_kernels.cli import main
from smoa_kernels.peft import SMoAConfig
from smoa_kernels.spectrum.model import model_spectrum

CONFIGS = {
    "SMoA": lambda targets: SMoAConfig(
        r=5,
        num_blocks=3,
        smoa_alpha=3,
        use_rslora=True,
        rank_pattern={targets[0]: 4},
        alpha_pattern={targets[0]: 7},
        num_blocks_pattern={targets[0]: 2},
        target_modules=targets,
        init_weights=False,
    ),
    "LoRA": lambda targets: LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=True,
        rank_pattern={targets[0]: 2},
        alpha_pattern={targets[0]: 7},
        target_modules=targets,
        init_lora_weights=False,
    ),
    "HiRA": lambda targets: HiraConfig(r=3, target_modules=targets, init_weights=False),
}
LAYERS = {tiny_llama: ["q_proj", "down_proj"], tiny_gpt2: ["c_attn", "c_fc"]}


def saved(folder, method, make_model=tiny_llama, targets=None):
    """A trained-like adapter in `folder`, and the model that it is in."""
    config = CONFIGS[method](targets or LAYERS[make_model])
    config.fan_in_fan_out = make_model is tiny_gpt2
    model = get_peft_model(make_model(), config)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def base(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def spectrum(*arguments):
    return main(["spectrum", *map(str, arguments)])


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("make_model", LAYERS)
def test_updates_are_those_of_pefts_layers(tmp_path, method, make_model):
    """Transposed bases, patterns, both scalings."""
    make_model().save_pretrained(tmp_path / "base")
    ours = saved(tmp_path / "ours", "SMoA", make_model)
    theirs = saved(tmp_path / "theirs", method, make_model)
    found = model_spectrum(tmp_path / "base", tmp_path / "ours", tmp_path / "theirs")
    assert found.sources["theirs"].method == method
    assert len(found.layers) == 4
    for key, model in (("ours", ours), ("theirs", theirs)):
        for name, layer in found.layers.items():
            module = model.get_submodule(f"base_model.model.{name}")
            stored = module.get_delta_weight("default").detach().double()
            if type(module).__module__.startswith("peft.tuners.hira"):
                stored = stored * module.get_base_layer().weight
            W0 = module.get_base_layer().weight.detach().double()
            update = layer.updates[key]
            assert update.relative_norm == pytest.approx(float(stored.norm() / W0.norm()), rel=1e-5)
            expected = torch.linalg.svdvals(stored)
            torch.testing.assert_close(update.singular_values, expected, rtol=1e-4, atol=1e-6 * expected[0])
    trained = {key: [p for p in m.parameters() if p.requires_grad] for key, m in (("o", ours), ("t", theirs))}
    if method != "SMoA":  # whose packed factors hold padding besides
        assert found.sources["theirs"].parameters == sum(p.numel() for p in trained["t"])
    smoa = (module for module in ours.modules() if hasattr(module, "num_adapter_parameters"))
    assert found.sources["ours"].parameters == sum(m.num_adapter_parameters("default") for m in smoa)
    assert found.sources["ours"].label == "SMoA r=4…5, K=2…3"


def test_random_factors_say_so_and_take_as_many_parameters(base, capsys):
    assert spectrum(base, "--rank", 4, "--blocks", 2) == 0
    out = capsys.readouterr().out
    linear = 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert f"SMoA r=4, K=2, random: factors are random, nothing is trained; {2 * linear:,} parameters" in out
    assert f"LoRA r=2, random: factors are random, nothing is trained; {2 * linear:,} parameters" in out
    kinds = [line.split()[0] for line in out.splitlines() if "×" in line]
    assert sorted(kinds) == [
        *(f"mlp.{name}_proj" for name in ("down", "gate", "up")),
        *(f"self_attn.{name}_proj" for name in "koqv"),
    ]


def test_random_factors_are_of_the_seed_and_the_layer(base):
    every, one, other = (
        model_spectrum(base, seed=seed, targets=targets)
        for seed, targets in ((0, ()), (0, ["q_proj"]), (1, ()))
    )
    assert len(one.layers) == 2
    for name, layer in one.layers.items():
        assert torch.equal(layer.updates["theirs"].left, every.layers[name].updates["theirs"].left)
        assert not torch.equal(layer.updates["theirs"].left, other.layers[name].updates["theirs"].left)
    first, second = one.layers.values()
    assert not torch.equal(first.updates["ours"].left, second.updates["ours"].left)


def test_json_and_full_table(base, tmp_path, capsys):
    saved(tmp_path / "smoa", "SMoA")
    saved(tmp_path / "lora", "LoRA", targets=["down_proj", "up_proj"])
    path = tmp_path / "spectrum.json"
    options = ("--adapter", tmp_path / "smoa", "--compare", tmp_path / "lora", "--full", "--json", path)
    assert spectrum(base, *options) == 0
    out = capsys.readouterr().out
    assert "4 layers are left out: only one of the adapters adapts them" in out
    assert "model.layers.1.mlp.down_proj" in out
    report = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    found = model_spectrum(base, tmp_path / "smoa", tmp_path / "lora")
    assert [layer["name"] for layer in report["layers"]] == list(found.layers)
    assert report["sources"]["theirs"] == {
        "label": "LoRA r=2", "method": "LoRA", "random": False, "ranks": [2], "num_blocks": [1], "parameters": 320
    }  # fmt: skip
    for written, layer in zip(report["layers"], found.layers.values(), strict=True):
        update = layer.updates["theirs"]
        assert written["updates"]["theirs"]["rank"] == update.rank == 2
        assert written["updates"]["theirs"]["coverage"] == pytest.approx(update.coverage, rel=1e-5)
        assert len(written["updates"]["theirs"]["singular_values"]) == 2
        assert written["singular_values"] == pytest.approx(layer.singular_values.tolist(), rel=1e-5)
        assert written["updates"]["ours"]["left_cumulated"][-1] == pytest.approx(1)
        assert sum(written["blocks"]["row_shares"]) == pytest.approx(1, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_figures(base, tmp_path, suffix, capsys):
    pytest.importorskip("matplotlib", reason="draws them")
    folder = tmp_path / "layers"
    folder.mkdir()
    files = []
    for i in range(2):
        path = tmp_path / f"overview{i}{suffix}"
        assert spectrum(base, "--figure", path) == 0
        files.append(path.read_bytes())
    assert spectrum(base, "--target", "k_proj", "--figure", path, "--layer-figures", folder) == 0
    assert files[0] == files[1]
    assert {p.name for p in folder.iterdir()} == {
        f"model.layers.{i}.self_attn.k_proj{suffix}" for i in (0, 1)
    }
    if suffix == ".png":
        assert files[0].startswith(b"\x89PNG")
        return
    text = " ".join(xml.etree.ElementTree.fromstring(files[0]).itertext())
    for words in (
        "SMoA r=8, K=2, random",
        "LoRA r=4, random",
        "Coverage of W0's directions",
        "self_attn.q_proj",
    ):
        assert words in text


def test_untrained_and_zero(base, tmp_path, capsys):
    """A fresh adapter's update is zero: its numbers are zeros, and its figure is drawn."""
    pytest.importorskip("matplotlib", reason="draws it")
    get_peft_model(tiny_llama(), SMoAConfig(r=4, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "fresh"
    )
    figure = tmp_path / "zero.svg"
    assert spectrum(base, "--adapter", tmp_path / "fresh", "--figure", figure) == 0
    assert figure.is_file()
    found = model_spectrum(base, tmp_path / "fresh")
    assert {
        (u.rank, u.coverage, u.effective_rank) for u in (la.updates["ours"] for la in found.layers.values())
    } == {(0, 0.0, 0.0)}


def without(path, ending):
    state = {k: v for k, v in load_file(path).items() if not k.endswith(ending)}
    save_file(state or {"x": torch.ones(1)}, path)


MISTAKES = {
    "method": (
        lambda f: edit_config(f / "smoa", peft_type="LORA"),
        "an adapter of the method 'LORA', not SMOA",
    ),
    "other method": (
        lambda f: edit_config(f / "lora", peft_type="VERA"),
        "an adapter of the method 'VERA', not SMOA or LORA or HIRA",
    ),
    "DoRA": (lambda f: edit_config(f / "lora", use_dora=True), "it is a DoRA adapter"),
    "no blocks": (lambda f: without(f / "smoa" / WEIGHTS, "smoa_blocks"), "the adapter lacks smoa_blocks"),
    "one factor": (
        lambda f: without(f / "lora" / WEIGHTS, "lora_A.weight"),
        "the adapter lacks lora_A.weight",
    ),
    "no layers": (
        lambda f: without(f / "lora" / WEIGHTS, ".weight"),
        "holds no linear layer of an adapter of the method LORA",
    ),
    "another base": (
        lambda f: tiny_llama(seed=1).save_pretrained(f / "base"),
        "layers.0.mlp.down_proj: the adapter was trained over another base weight, which differs by about",
    ),
    "another shape": (
        lambda f: tiny_llama(intermediate_size=40).save_pretrained(f / "base"),
        "layers.0.mlp.down_proj: the SMoA adapter is for (32, 48), the model has (32, 40)",
    ),
    "no such layer": (
        lambda f: without(f / "base" / "model.safetensors", "layers.1.mlp.down_proj.weight"),
        "has no layer model.layers.1.mlp.down_proj, which the adapter adapts",
    ),
    "no number": (
        lambda f: put(f / "base" / "model.safetensors", "model.layers.1.mlp.down_proj.weight", torch.nan),
        "model.layers.1.mlp.down_proj: weight must be finite",
    ),
    "nothing in common": (
        lambda f: saved(f / "lora", "LoRA", targets=["up_proj"]),
        "the two adapters have no layer in common",
    ),
}


def put(path, key, value):
    state = load_file(path)
    state[key][0, 0] = value
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line(base, tmp_path, capsys, case):
    saved(tmp_path / "smoa", "SMoA")
    saved(tmp_path / "lora", "LoRA")
    spoil, message = MISTAKES[case]
    spoil(tmp_path)
    assert_refused(
        capsys, spectrum, message, base, "--adapter", tmp_path / "smoa", "--compare", tmp_path / "lora"
    )


def test_model_folders_that_cannot_be_measured(base, tmp_path, capsys):
    assert_refused(
        capsys, spectrum, "no layer's name ends with q; the layers are mlp.down_proj, ", base, "--target", "q"
    )
    assert_refused(
        capsys,
        spectrum,
        "num_blocks must be at most min(out_features, in_features) = 16",
        base,
        "--blocks",
        17,
        "--rank",
        17,
    )
    (base / "config.json").write_text("{")
    assert_refused(capsys, spectrum, "config.json", base)
    (base / "config.json").unlink()
    assert_refused(capsys, spectrum, f"there is no config.json in {base}", base)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("peft", "smoa-kernels[peft]"),
        ("matplotlib", "--figure needs matplotlib: pip install 'smoa-kernels[plot]'"),
    ],
)
def test_without_an_extra(base, tmp_path, missing, words):
    """The one that is missing is named, before anything is computed; in a process where it cannot be imported."""
    program = (
        f"import sys; sys.modules[{missing!r}] = None; from smoa_kernels.cli import main; "
        f"sys.exit(main(['spectrum', {str(base)!r}, '--figure', {str(tmp_path / 'a.svg')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("smoa-kernels: error: ")
    assert words in done.stderr.splitlines()[-1]
