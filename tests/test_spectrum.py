"""The example that measures the directions of an update: cases with known numbers, PEFT's own ΔW, one run."""

import math
import xml.etree.ElementTree

import pytest
import torch
from peft import HiraConfig, LoraConfig, get_peft_model
from spectrum import main, measure, model_spectrum
from tiny_models import tiny_gpt2, tiny_llama

from smoa_kernels import BlockPartition
from smoa_kernels.peft import SMoAConfig

DIAGONAL = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
ONE = BlockPartition.from_weight(DIAGONAL, 1)
ROW = torch.zeros(4, 4)
ROW[0] = 2.0


@pytest.mark.parametrize(
    ("update", "left", "right", "rank", "effective", "coverage"),
    [
        (ROW, [1, 0, 0, 0], [1 / 4] * 4, 1, 1.0, 1 / 2),
        (torch.eye(4), [1 / 4] * 4, [1 / 4] * 4, 4, 4.0, 1.0),
        (torch.ones(4, 4), [1 / 4] * 4, [1 / 4] * 4, 1, 1.0, 1.0),
        (torch.zeros(4, 4), [0] * 4, [0] * 4, 0, 0.0, 0.0),
    ],
    ids=["a row", "every direction by itself", "every direction at once", "nothing"],
)
def test_over_a_diagonal_weight(update, left, right, rank, effective, coverage):
    """The singular directions are the coordinates. Rank one may touch all of them: coverage is not rank."""
    found = measure(DIAGONAL, ONE, {"it": update}).updates["it"]
    assert found.left.tolist() == pytest.approx(left)
    assert found.right.tolist() == pytest.approx(right)
    assert (found.rank, found.effective_rank) == (rank, pytest.approx(effective))
    assert found.coverage == pytest.approx(coverage)


def test_blocks_of_a_diagonal_weight():
    layer = measure(DIAGONAL, BlockPartition.from_weight(DIAGONAL, 2), {})
    assert layer.singular_values.tolist() == [4, 3, 2, 1]
    assert layer.diagonal.tolist() == pytest.approx([25 / 30, 5 / 30])
    assert layer.blocks.tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]


def test_random_low_rank_touches_many_directions_in_few_ways():
    """Shares follow χ² with r degrees of freedom: coverage `r/2 · e^-ψ(r/2 + 1)` at every size (docs/spectrum.md)."""
    torch.manual_seed(0)
    weight, r = torch.randn(400, 400), 4
    partition = BlockPartition.contiguous((400, 400), 1)
    update = torch.randn(400, r, dtype=torch.float64) @ torch.randn(r, 400, dtype=torch.float64)
    found = measure(weight, partition, {"it": update}).updates["it"]
    expected = r / 2 * math.exp(-float(torch.special.digamma(torch.tensor(r / 2 + 1))))
    assert found.coverage == pytest.approx(expected, rel=0.08)
    assert found.rank == r
    assert found.effective_rank <= r


@pytest.mark.parametrize("method", ["smoa", "lora", "hira"])
@pytest.mark.parametrize("make_model", [tiny_llama, tiny_gpt2])
def test_updates_are_those_of_pefts_layers(tmp_path, make_model, method):
    """Checked for transposed bases too."""
    targets = ["q_proj", "down_proj"] if make_model is tiny_llama else ["c_attn", "c_fc"]
    shared = {"r": 3, "target_modules": targets, "fan_in_fan_out": make_model is tiny_gpt2}
    config = {
        "smoa": SMoAConfig(**shared, num_blocks=3, smoa_alpha=4, init_weights=False),
        "lora": LoraConfig(**shared, lora_alpha=5, init_lora_weights=False),
        "hira": HiraConfig(**shared, init_weights=False),
    }[method]
    make_model().save_pretrained(tmp_path / "base")
    ours = SMoAConfig(**shared, num_blocks=2, init_weights=False)
    get_peft_model(make_model(), ours).save_pretrained(tmp_path / "smoa")
    model = get_peft_model(make_model(), config)
    model.save_pretrained(tmp_path / "other")
    layers = model_spectrum(tmp_path / "base", tmp_path / "smoa", tmp_path / "other")
    assert len(layers) == 4
    merged = model.merge_and_unload().requires_grad_(False)
    for name, layer in layers.items():
        before = make_model().requires_grad_(False).get_submodule(name).weight
        change = merged.get_submodule(name).weight - before
        expected = torch.linalg.svdvals(change)
        found = list(layer.updates.values())[1].singular_values.float()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(before.norm()))
        torch.testing.assert_close(layer.singular_values.float(), torch.linalg.svdvals(before))


@pytest.mark.slow
def test_a_run_with_random_factors(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "base")
    main(tmp_path / "base", target=["q_proj"], figure=tmp_path / "figure.svg")
    out = capsys.readouterr().out
    assert "self_attn.q_proj, 2 layers" in out
    assert "SMoA r=8, K=2, random" in out
    text = " ".join(xml.etree.ElementTree.parse(tmp_path / "figure.svg").getroot().itertext())
    assert "LoRA r=4, random: left" in text
    assert "Energy of ΔW along W0's singular directions" in text
    with pytest.raises(ValueError, match="no layer of both adapters"):
        model_spectrum(tmp_path / "base", targets=("nowhere",))
