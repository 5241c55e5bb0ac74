"""Adapter folders read as tensors of LoRA's shapes; unsupported adapters are refused. No engine is needed."""

import json
import subprocess
import sys

import pytest
import torch
from peft import HiraConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from smoa_kernels.adapter_folder.format import PREFIX
from smoa_kernels.peft import SMoAConfig
from smoa_kernels.serving.factors import read_served

UNEQUAL = SMoAConfig(
    r=6, num_blocks=3, block_ranks=[4, 0, 2], target_modules=["0", "2"], smoa_alpha=3, alpha_pattern={"2": 9},
    rank_pattern={"2": 4}, use_rslora=True, init_weights=False,
)  # fmt: skip
CONFIGS = {
    "smoa": SMoAConfig(r=4, num_blocks=2, target_modules=["0", "2"], init_weights=False),
    "unequal ranks and patterns": UNEQUAL,
    "hira": HiraConfig(r=3, target_modules=["0", "2"], init_weights=False),
}


def save(config, folder):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 9)), config)
    model.save_pretrained(str(folder))
    return model


def change(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_product_of_the_factors_is_the_update_over_w0(config, tmp_path):
    model = save(config, tmp_path)
    adapter = read_served(tmp_path)
    assert set(adapter.layers) == {"0", "2"}
    for name, factors in adapter.layers.items():
        layer = model.base_model.model.get_submodule(name)
        update = layer.get_delta_weight("default")
        if isinstance(config, SMoAConfig):
            update = update / layer.weight
        torch.testing.assert_close(factors.B @ factors.A, update, rtol=1e-4, atol=1e-6)
        rows, cols, ranks = factors.labels
        block = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))
        assert not (factors.A * (block[:, None] != cols)).any()
        assert not (factors.B * (rows != block)).any()
    assert adapter.rank == max(len(factors.A) for factors in adapter.layers.values())


def test_folders_of_other_methods_are_left_to_the_engine(tmp_path):
    assert read_served(tmp_path) is None
    save(LoraConfig(r=2, target_modules=["0"]), tmp_path)
    assert read_served(tmp_path) is None
    (tmp_path / "adapter_config.json").write_text("[")
    assert read_served(tmp_path) is None


@pytest.mark.parametrize("method", ["smoa", "hira"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("modules_to_save", ["2"]),
        ("target_parameters", ["experts.down_proj"]),
        ("fan_in_fan_out", True),
        ("bias", "all"),
    ],
)
def test_settings_that_no_engine_supports_are_refused_by_name(method, key, value, tmp_path):
    save(CONFIGS[method], tmp_path)
    change(tmp_path, **{key: value})
    with pytest.raises(ValueError, match=r"adapter_config\.json: .*cannot be served; `smoa-kernels merge`"):
        read_served(tmp_path)


@pytest.mark.parametrize("key", ["base_model.model.2.weight", "base_model.model.2.lora_A.weight"])
def test_other_tensors_are_refused_by_name(key, tmp_path):
    save(CONFIGS["smoa"], tmp_path)
    change(tmp_path, weights_sha256=None)
    path = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(path), key: torch.ones(2)}, path)
    with pytest.raises(ValueError, match=f"{key.removeprefix(PREFIX)} cannot be served"):
        read_served(tmp_path)


def test_reading_needs_neither_peft_nor_transformers(tmp_path):
    save(CONFIGS["smoa"], tmp_path)
    code = (
        "import sys; sys.modules.update(peft=None, transformers=None)\n"
        "from pathlib import Path; from smoa_kernels.serving.factors import read_served\n"
        "import smoa_kernels.serving.vllm\n"
        "print(sorted(read_served(Path(sys.argv[1])).layers))"
    )
    found = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "['0', '2']"
