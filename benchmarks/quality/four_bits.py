"""Models in four bits: the adapted layers are quantised, adapters are trained on those and merged into four bits."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from smoa_kernels.adapter_folder.quantized import QuantizedWeight, column_groups, group_multiplier, rescale
from smoa_kernels.peft.layer import SMoALayer

GROUP = 64  # columns that share a scale
INT4, NF4 = "int4", "NF4"


def quantize(weight: Tensor, bits: str) -> QuantizedWeight:
    """Round a matrix to four bits, each entry to the nearest: symmetric integers as compressed-tensors has them, with
    scales in float16, or bitsandbytes' NF4, with scales in float32."""
    if bits == INT4:
        numbers, largest, dtype = torch.arange(-8.0, 8.0), 7.5, torch.float16
    else:
        functional = importlib.import_module("bitsandbytes.functional")
        numbers, largest, dtype = functional.get_4bit_type("nf4", device="cpu"), 1.0, torch.float32
    grouped = weight.detach().unflatten(1, (-1, GROUP))
    scales = (grouped.abs().amax(-1) / largest).to(dtype)
    codes = numbers[torch.bucketize(grouped / scales[..., None].float(), (numbers[1:] + numbers[:-1]) / 2)]
    groups = column_groups(weight.shape[1], scales.shape[1])
    return QuantizedWeight(lambda: codes.flatten(1).clone(), scales, groups, lambda _: {})


def quantize_layers(model: nn.Module, pattern: str, bits: str) -> dict[nn.Module, QuantizedWeight]:
    """Give the linear layers whose names match the values of their quantised weights, which are returned."""
    found: dict[nn.Module, QuantizedWeight] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and re.fullmatch(pattern, name):
            found[layer] = quantize(layer.weight, bits)
            layer.weight = nn.Parameter(found[layer].dequantize(), requires_grad=False)
    return found


class Multipliers(nn.Module):
    """A free multiplier `1 + change` for each group of a row: PEQA (arXiv 2305.14152), which trains all scales."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros(len(weight), weight.shape[1] // GROUP))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight times its groups' multipliers."""
        return weight * (1 + self.change).repeat_interleave(GROUP, dim=1)


def free_scales(model: nn.Module, pattern: str) -> nn.Module:
    """Make the scales of matching layers trainable."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and re.fullmatch(pattern, name):
            parametrize.register_parametrization(layer, "weight", Multipliers(layer.weight))
    return model


@torch.no_grad()
def merge(model: nn.Module, layers: Mapping[nn.Module, QuantizedWeight], bits: str) -> None:
    """Merge the trained adapters into four bits: scales change where the multiplier is one for a group; a sum is
    quantised anew, with new scales."""
    for module in list(model.modules()):
        adapted: Any = module
        if isinstance(module, SMoALayer):
            layer, multiplier = adapted.get_base_layer(), group_multiplier(adapted.smoa["default"])
        elif isinstance(module, LoraLayer):
            layer, multiplier = adapted.get_base_layer(), None
        elif module in layers and parametrize.is_parametrized(module):
            layer, multiplier = adapted, 1 + adapted.parametrizations.weight[0].change
            parametrize.remove_parametrizations(layer, "weight")
        else:
            continue
        old = layers[layer]
        if multiplier is None:
            new = quantize(old.dequantize() + adapted.get_delta_weight("default"), bits)
        else:
            new = old._replace(scales=rescale(old, multiplier, old.groups).scales)
        layer.weight.data = new.dequantize()
    tuner: Any = getattr(model, "base_model", None)
    if tuner is not None:  # PEFT's
        tuner.disable_adapter_layers()
