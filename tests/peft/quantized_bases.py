"""Quantised bases of a tiny model: bitsandbytes, torchao and transformers' FP8.

Importing this file skips the tests if the extra of quantised bases is not installed.
"""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from transformers.integrations.finegrained_fp8 import FP8Linear

bnb = pytest.importorskip("bitsandbytes", reason="the extra of quantised bases is not installed")
torchao = pytest.importorskip("torchao.quantization", reason="the extra of quantised bases is not installed")
int4 = pytest.importorskip(
    "torchao.prototype.quantization.int4", reason="torchao lacks its 4-bit kernel for CPUs"
)
mx_formats = pytest.importorskip(
    "torchao.prototype.mx_formats.inference_workflow", reason="torchao lacks its 4-bit floats"
)


def four_bits(kind, double=False, compute=torch.float32):
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute,
    )


def float8(model, block=(48, 32)):
    """A plain model's linear layers as transformers' `FP8Linear`, whose own GEMM needs a GPU."""
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and "lm_head" not in name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, float8_layer(linear, block))
    return model


def float8_layer(linear, block):
    layer = FP8Linear(linear.in_features, linear.out_features, block, has_bias=linear.bias is not None)
    weight, (height, width) = linear.weight.data.float(), block or linear.weight.shape
    of_weight = torch.empty_like(weight)
    scales = torch.empty(-(-weight.shape[0] // height), -(-weight.shape[1] // width))
    for row, col in np.ndindex(*scales.shape):
        part = np.s_[row * height : (row + 1) * height, col * width : (col + 1) * width]
        of_weight[part] = scales[row, col] = weight[part].abs().max() / 448
    layer.weight = nn.Parameter((weight / of_weight).to(torch.float8_e4m3fn), requires_grad=False)
    layer.weight_scale_inv = nn.Parameter(scales.view(()) if block is None else scales, requires_grad=False)
    layer.bias = linear.bias
    layer.wanted = layer.weight.float() * of_weight  # W0
    return layer


# torchao's tile-packed 4-bit kernel needs a GPU.
TILE_PACKED = "torchao int4 on a GPU"
KINDS = {
    "nf4": four_bits("nf4"),
    "nf4 in bf16": four_bits("nf4", compute=torch.bfloat16),
    "nf4, double": four_bits("nf4", double=True),
    "fp4": four_bits("fp4"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": TorchAoConfig(torchao.Int8WeightOnlyConfig()),
    "torchao int4": TorchAoConfig(int4.PrototypeInt4WeightOnlyConfig(group_size=32)),
    "torchao float8": TorchAoConfig(torchao.Float8WeightOnlyConfig()),
    "torchao nvfp4": TorchAoConfig(mx_formats.NVFP4WeightOnlyConfig()),
    "fp8": float8,
    TILE_PACKED: TorchAoConfig(
        torchao.Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d")
    ),
}


def load(folder, kind, dtype=torch.float32):
    """The base in a folder, quantised."""
    config, device = KINDS[kind], "cuda" if kind == TILE_PACKED else "cpu"
    if callable(config):
        return config(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)).eval()
    given = {"quantization_config": config, "device_map": device}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **given).eval()
