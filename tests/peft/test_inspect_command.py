"""`smoa-kernels inspect`: the table, the check against a base, JSON, and one-line errors."""

import json
import math

import pytest
from adapted import WEIGHTS, adapt, assert_refused, layers
from peft import get_peft_model
from places import ran
from tiny_models import tiny_llama

from smoa_kernels.adapter_folder.inspecting import inspect_adapter
from smoa_kernels.cli import main
from smoa_kernels.peft import SMoAConfig


@pytest.fixture
def adapter(tmp_path):
    model = tiny_llama(num_hidden_layers=11)
    targets = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}
    config = SMoAConfig(r=5, num_blocks=3, **targets)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def inspect(*arguments):
    return main(["inspect", *map(str, arguments)])


def test_a_row_sums_up_a_kind_of_layer(adapter, capsys):
    assert inspect(adapter) == 0
    out, err = capsys.readouterr()
    rows = [line.split("│") for line in out.splitlines() if "│" in line]
    names = [row[0].strip() for row in rows]
    assert names == ["model.layers.*.mlp.down_proj", "model.layers.*.self_attn.q_proj"]
    assert [cell.strip() for cell in rows[1][1:]] == ["32×32", "3", "2 2 1", f"{11 * (2 * 44 + 20):,}", "11"]
    assert not err


def test_it_imports_neither_peft_nor_transformers(adapter):
    """Both take seconds to import and print notices."""
    code = (
        "import sys; from smoa_kernels.cli import main; main(['inspect', sys.argv[1]]); "
        "print(sorted({'peft', 'transformers', 'torchao'} & sys.modules.keys()))"
    )
    done = ran("-c", code, adapter)
    assert done.stdout.splitlines()[-1] == "[]"
    assert not done.stderr


@pytest.mark.parametrize(
    ("base", "code", "said"),
    [
        ({"seed": 0, "num_hidden_layers": 11}, 0, "✓ every layer fits"),
        ({"seed": 1, "num_hidden_layers": 11}, 1, "✗ 22 of 22 layers do not fit"),
        ({"seed": 0, "num_hidden_layers": 11, "intermediate_size": 40}, 1, "✗ lacks it in this shape"),
    ],
)
def test_verdict_on_a_base(adapter, tmp_path, capsys, base, code, said):
    tiny_llama(**base).save_pretrained(tmp_path / "base")
    path = tmp_path / "report.json"
    assert inspect(adapter, "--base", tmp_path / "base", "--json", path) == code
    assert said in capsys.readouterr().out
    report = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert report["fits"] is (code == 0)
    assert report["config"]["num_blocks"] == 3
    assert [layer["fits"] for layer in report["layers"]].count(True) == (22 if code == 0 else 0)
    first = report["layers"][0]
    assert first["name"] == "model.layers.0.mlp.down_proj"
    assert (first["ranks"], first["shape"], first["num_blocks"]) == ([2, 2, 1], [32, 48], 3)
    if code == 0:
        assert math.isclose(first["base_distance"], 0, abs_tol=1e-3)


@pytest.mark.parametrize(("scale", "said"), [(1, "✓ same base"), (1.03, "✓ differs by 4.")])
def test_how_far_the_base_is(adapter, tmp_path, capsys, scale, said):
    """Rounding the adapter's sketch, and the base to bfloat16, leaves the same base."""
    base = tiny_llama(num_hidden_layers=11)
    for parameter in base.parameters():
        parameter.data *= scale
    base.bfloat16().save_pretrained(tmp_path / "base")
    assert inspect(adapter, "--base", tmp_path / "base") == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "_proj" in line]
    assert len(rows) == 2
    assert all(said in row for row in rows)


def test_report_of_a_folder(make_model, folder, tmp_path):
    path, _ = folder
    counts_seen = []
    report = inspect_adapter(path, progress=lambda *counts: counts_seen.append(counts))
    assert counts_seen == [(i + 1, len(report.layers)) for i in range(len(report.layers))]
    model = adapt(make_model())
    assert [f"base_model.model.{layer.name}" for layer in report.layers] == sorted(layers(model))
    for layer in report.layers:
        module = layers(model)[f"base_model.model.{layer.name}"]
        assert layer.shape == (module.out_features, module.in_features)
        assert layer.ranks == (2, 2, 1)
        assert layer.parameters == module.smoa["default"].num_parameters
        assert len(layer.fingerprint) == 16
        assert layer.fits is None
    assert report.file_size == (path / WEIGHTS).stat().st_size
    assert not report.other_tensors
    make_model().bfloat16().save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert inspect_adapter(path, tmp_path / "sharded").fits
    make_model(seed=1).save_pretrained(tmp_path / "other")
    other = inspect_adapter(path, tmp_path / "other")
    assert not other.fits
    # √2, with a standard deviation of an eighth of it: a sketch has 32 projections.
    assert all(0.7 < layer.base_distance < 2.1 for layer in other.layers)


def test_a_base_that_was_saved_with_or_without_its_head(llama, tmp_path):
    """Tensor names start with `model.` in one kind of base and not in the other."""
    llama().save_pretrained(tmp_path / "whole")
    llama().model.save_pretrained(tmp_path / "bare")
    adapt(llama()).save_pretrained(tmp_path / "adapter")
    adapt(llama().model).save_pretrained(tmp_path / "bare adapter")
    for adapter, base in (("adapter", "bare"), ("bare adapter", "whole")):
        assert inspect_adapter(tmp_path / adapter, tmp_path / base).fits
    llama(seed=1).model.save_pretrained(tmp_path / "other")
    assert not inspect_adapter(tmp_path / "adapter", tmp_path / "other").fits


def test_base_that_cannot_be_read(adapter, tmp_path, capsys):
    assert_refused(capsys, inspect, "there are no safetensors files in", adapter, "--base", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    assert_refused(capsys, inspect, "no readable safetensors file", adapter, "--base", tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    assert_refused(capsys, inspect, "is not an index of safetensors files", adapter, "--base", tmp_path)
    index.write_text('{"weight_map": {"model.layers.0.mlp.down_proj.weight": "lost.safetensors"}}')
    assert_refused(capsys, inspect, "no readable safetensors file", adapter, "--base", tmp_path)
