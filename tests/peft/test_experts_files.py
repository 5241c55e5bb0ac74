"""Experts' adapters and bases on disk: the commands' output, and transformers' names of stored weights."""

import re

import pytest
from adapted import close, logits
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_experts import adapt, tiny_experts, weights
from transformers import AutoModelForCausalLM

from smoa_kernels.adapter_folder.inspecting import inspect_adapter
from smoa_kernels.cli import main


@pytest.fixture
def adapter(tmp_path):
    adapt(tiny_experts(), block_order="random").save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_commands_on_bases_as_transformers_saves_them(tmp_path, kind, capsys):
    """Stored expert by expert, or fused and transposed as gpt-oss."""
    model = tiny_experts(kind)
    model.save_pretrained(tmp_path / "base")
    adapted = adapt(model, block_order="random")
    adapted.save_pretrained(tmp_path / "adapter")
    shapes = [(6, weight.out_features, weight.in_features) for weight in weights(adapted).values()]
    report = inspect_adapter(tmp_path / "adapter", tmp_path / "base")
    assert sorted(layer.shape for layer in report.layers) == sorted(shapes)
    assert report.fits
    assert max(layer.base_distance for layer in report.layers) < 1e-3
    with safe_open(tmp_path / "base" / "model.safetensors", "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping
    (changed,) = (
        key for key in state if re.search(r"1\.\w+\.experts\.(4\.)?(down_proj|w2)(\.weight)?$", key)
    )
    (state[changed] if kind != "gpt_oss" else state[changed][4]).normal_()
    save_file(state, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    report = inspect_adapter(tmp_path / "adapter", tmp_path / "base")
    assert [layer.worst_expert for layer in report.layers if not layer.fits] == [4]
    assert main(["inspect", str(tmp_path / "adapter"), "--base", str(tmp_path / "base")]) == 1
    assert "(expert 4)" in capsys.readouterr().out


def test_bases_that_are_stored_expert_by_expert(tokens, adapter, tmp_path, transformers_adapters):
    """transformers stores Qwen3-MoE's experts one by one and fuses them on loading; the adapter's names stay."""
    tiny_experts().save_pretrained(tmp_path / "v4")
    with safe_open(tmp_path / "v4" / "model.safetensors", "pt") as file:
        assert "model.layers.0.mlp.experts.5.down_proj.weight" in file.keys()  # noqa: SIM118
    expected = logits(adapt(tiny_experts(), block_order="random"), tokens)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "v4").eval()
    model.load_adapter(str(adapter))
    close(logits(model, tokens), expected)
