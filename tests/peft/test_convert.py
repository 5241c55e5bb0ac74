"""`smoa-kernels convert`: a HiRA folder becomes an SMoA folder with K = 1, or is refused."""

import copy

import pytest
import torch
from adapted import WEIGHTS, assert_refused, edit_config, edit_weights, hira_config, trained
from peft import HiraConfig, LoraConfig, PeftModel
from safetensors.torch import load_file
from tiny_models import tiny_gpt2
from torch import nn

from smoa_kernels.adapter_folder.inspecting import inspect_adapter
from smoa_kernels.cli import main
from smoa_kernels.peft import SMoAConfig, accelerate_hira, convert_adapter


@pytest.fixture
def base(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def hira(make_model, base, tmp_path):
    """A HiRA folder whose configuration names the base's folder, and its accelerated model."""
    model = make_model()
    config = hira_config(model, hira_dropout=0.25, modules_to_save=["lm_head"])
    model = trained(model, config, tmp_path / "hira")
    edit_config(tmp_path / "hira", base_model_name_or_path=str(base))
    accelerate_hira(model)
    return tmp_path / "hira", model


def test_there_and_back(hira, base, make_model, tokens, tmp_path, capsys):
    folder, model = hira
    counts_seen = []
    convert_adapter(folder, tmp_path / "smoa", progress=lambda *counts: counts_seen.append(counts))
    report = inspect_adapter(tmp_path / "smoa", base)
    assert counts_seen == [(i, len(report.layers)) for i in range(len(report.layers))]
    assert report.fits
    assert {layer.ranks for layer in report.layers} == {(4,)}
    assert (report.config["num_blocks"], report.config["smoa_dropout"]) == (1, 0.25)
    # Strict loading raises if the sketches differ from the base's.
    converted = PeftModel.from_pretrained(make_model(), tmp_path / "smoa", strict_base=True)
    assert torch.equal(converted(tokens).logits, model(tokens).logits)
    dropped = []
    for each in (model, converted):
        torch.manual_seed(3)
        dropped.append(each.train()(tokens).logits)
        each.eval()
    assert torch.equal(*dropped)
    assert not torch.allclose(dropped[0], model(tokens).logits, atol=1e-2)

    converted.save_pretrained(tmp_path / "saved")
    assert main(["convert", str(tmp_path / "saved"), str(tmp_path / "back")]) == 0
    assert "HiRA, converted from" in capsys.readouterr().out
    first, last = (load_file(path / WEIGHTS) for path in (folder, tmp_path / "back"))
    assert first.keys() == last.keys()
    assert all(torch.equal(first[key], last[key]) for key in first)
    again = PeftModel.from_pretrained(make_model(), tmp_path / "back")
    accelerate_hira(again)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    one, other = (HiraConfig.from_pretrained(path) for path in (folder, tmp_path / "back"))
    for name in ("r", "target_modules", "hira_dropout", "fan_in_fan_out", "modules_to_save", "task_type"):
        assert getattr(one, name) == getattr(other, name)


def test_ranks_are_the_files(base, make_model, tmp_path):
    """PEFT 0.21.2 ignores `rank_pattern` for plain layers; other tools and releases may not."""
    model = make_model()
    trained(model, hira_config(model), tmp_path / "hira")

    def narrow(state):
        name = next(key for key in state if key.endswith("hira_A"))
        state[name] = state[name][:2].clone()
        other = name.replace("hira_A", "hira_B")
        state[other] = state[other][:, :2].clone()

    edit_weights(tmp_path / "hira", narrow)
    edit_config(tmp_path / "hira", rank_pattern={"nothing": 9})
    convert_adapter(tmp_path / "hira", tmp_path / "smoa", base)
    report = inspect_adapter(tmp_path / "smoa", base)
    assert sorted({layer.ranks for layer in report.layers}) == [(2,), (4,)]
    PeftModel.from_pretrained(make_model(), tmp_path / "smoa")
    with pytest.raises(ValueError, match=r"rank 2 beside r=4 has no counterpart"):
        convert_adapter(tmp_path / "smoa", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_square_weight_is_read_as_its_layer_stores_it(tmp_path, recwarn):
    """PEFT corrects `fan_in_fan_out` for each layer, whatever the configuration says."""
    base, hira, smoa = (tmp_path / name for name in ("base", "hira", "smoa"))
    tiny_gpt2().save_pretrained(base)
    trained(tiny_gpt2(), hira_config(target_modules=["attn.c_proj"]), hira)
    convert_adapter(hira, smoa, base)
    PeftModel.from_pretrained(tiny_gpt2(), smoa, strict_base=True)


def one_block(**settings):
    return SMoAConfig(**{"r": 4, "num_blocks": 1, "target_modules": ["0"], **settings})


HIRA = HiraConfig(r=2, target_modules=["0"])


@pytest.mark.parametrize(
    ("layer", "config", "message"),
    [
        (nn.Linear(8, 6), one_block(bias="all"), "bias='all' has no counterpart"),
        (nn.Linear(8, 6), one_block(num_blocks=2), "num_blocks=2 has no counterpart"),
        (nn.Linear(8, 6), one_block(num_blocks_pattern={"0": 3}), "0: num_blocks=3 has no counterpart"),
        (nn.Embedding(5, 6), HIRA, "0 is an embedding"),
        (nn.Conv1d(3, 4, 2), HIRA, "0 is a convolution"),
        (nn.Linear(8, 6), HIRA, "base must be given"),
        (nn.Linear(8, 6), LoraConfig(r=2, target_modules=["0"]), "LORA"),
    ],
)
def test_what_has_no_counterpart_is_refused(layer, config, message, tmp_path, capsys):
    trained(nn.Sequential(copy.deepcopy(layer)), config, tmp_path / "adapter")
    arguments = ["convert", str(tmp_path / "adapter"), str(tmp_path / "out")]
    assert_refused(capsys, lambda *given: main(list(given)), message, *arguments)
    assert not (tmp_path / "out").exists()


def test_bad_folders_are_refused(hira, base, tmp_path):
    folder, _ = hira
    for full in (folder, base):
        before = sorted(base.iterdir())
        with pytest.raises(ValueError, match="out must be a new or an empty folder"):
            convert_adapter(folder, full)
        assert sorted(base.iterdir()) == before
    with pytest.raises(TypeError, match="out"):
        convert_adapter(folder, 3)
    trained(nn.Sequential(nn.Linear(8, 6)), HIRA, tmp_path / "small")
    with pytest.raises(ValueError, match="lacks"):
        convert_adapter(tmp_path / "small", tmp_path / "out", base)
    edit_weights(folder, lambda state: state.pop(next(key for key in state if key.endswith("hira_B"))))
    with pytest.raises(ValueError, match="no hira_B"):
        convert_adapter(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
