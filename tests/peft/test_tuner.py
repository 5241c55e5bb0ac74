"""Common PEFT calls on tiny Llama (nn.Linear) and GPT-2 (Conv1D) models."""

import pytest
import torch
from adapted import adapt, layers, logits
from peft import get_peft_model

from smoa_kernels import BlockPartition
from smoa_kernels.adapter_folder.format import blocks_layout, pack_blocks, unpack_blocks
from smoa_kernels.peft import SMoAConfig
from smoa_kernels.peft.base_weight import BaseWeight


def test_layers_keep_their_settings_when_the_configuration_changes(llama):
    model = adapt(llama(), smoa_dropout=0.5)
    model.peft_config["default"].smoa_dropout = 0.0
    assert {layer.settings["default"].smoa_dropout for layer in layers(model).values()} == {0.5}


# Saving and loading


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 7, 8, 256, 300])
def test_packed_blocks_round_trip(num_blocks):
    labels = torch.arange(640).remainder(num_blocks)[torch.randperm(640)]
    partition = BlockPartition.from_labels(labels[:317], labels[317:], num_blocks)
    ranks, sketch = torch.arange(num_blocks, dtype=torch.int32), torch.randn(33).half().float()
    packed = pack_blocks(partition, ranks, sketch)
    bits = (num_blocks - 1).bit_length()
    assert len(packed) == blocks_layout(317, 323, num_blocks).itemsize == 8 + 4 * num_blocks + 66 + 80 * bits
    found = unpack_blocks(packed, 317, 323)
    assert found.partition == partition
    assert torch.equal(found.ranks, ranks)
    assert torch.equal(found.sketch, sketch)


@pytest.mark.numerical
def test_configuration_without_weights_starts_a_new_adapter(folder, make_model, tokens):
    path, _ = folder
    config = SMoAConfig.from_pretrained(path)
    config.inference_mode = False
    model = get_peft_model(make_model(), config).train()
    logits(model, tokens).sum().backward()
    for layer in layers(model).values():
        assert layer.partition("default") == BlockPartition.from_weight(layer.base_weight(), 3)
        assert layer.smoa_A["default"].grad is not None


# Merging


@pytest.mark.numerical
def test_safe_merge_refuses_a_broken_adapter_before_it_writes(llama, monkeypatch):
    model = adapt(llama())
    layer = next(iter(layers(model).values()))
    weight = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.smoa_B["default"].fill_(torch.nan)
    monkeypatch.delattr(BaseWeight, "_write")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)
