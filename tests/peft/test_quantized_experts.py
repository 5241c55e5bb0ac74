"""Experts of MXFP4 and FP8 checkpoints, which transformers dequantises on loading on a CPU."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_experts import adapt, tiny_experts
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from smoa_kernels.peft import merge_to_folder

FOUR_BITS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def mxfp4(name, weight):
    """gpt-oss' fused weight (experts, in, out) as a checkpoint stores it, and its values: a scale per 32 numbers."""
    if not name.endswith(("gate_up_proj", "down_proj")):
        return {name: weight}, weight
    count, inputs, outputs = weight.shape
    blocks = torch.randint(256, (count, outputs, inputs // 32, 16), dtype=torch.uint8)
    scales = torch.randint(118, 124, blocks.shape[:3], dtype=torch.uint8)
    numbers = FOUR_BITS[torch.stack([blocks & 15, blocks >> 4], -1).long()].flatten(-2)
    meant = (numbers * torch.exp2(scales.float() - 127)[..., None]).flatten(-2).transpose(1, 2)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, meant.to(weight.dtype).contiguous()


def fp8(name, weight):
    """Likewise for a linear layer or one expert's weight, with a scale per 8×8 block."""
    if not name.endswith("_proj.weight"):
        return {name: weight}, weight
    blocks = weight.float().unflatten(1, (-1, 8)).unflatten(0, (-1, 8))
    scales = blocks.abs().amax((1, 3), keepdim=True) / 448
    numbers = (blocks / scales).to(torch.float8_e4m3fn)
    meant = (numbers.float() * scales).reshape(weight.shape).to(weight.dtype)
    return {name: numbers.reshape(weight.shape), f"{name}_scale_inv": scales[:, 0, :, 0].contiguous()}, meant


GPT_OSS = ("gpt_oss", {"hidden_size": 64, "intermediate_size": 64})
CASES = {
    "mxfp4": (GPT_OSS, mxfp4, {"quant_method": "mxfp4"}, Mxfp4Config),
    "fp8": (
        ("qwen3_moe", {}),
        fp8,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 8]},
        FineGrainedFP8Config,
    ),
}


@pytest.fixture(params=CASES)
def saved(request, tmp_path):
    """The quantisation's name, the option that dequantises, a quantised folder, and one of the same plain weights."""
    (kind, sizes), quantise, settings, ask = CASES[request.param]
    plain, quantised = tmp_path / "plain", tmp_path / "quantised"
    tiny_experts(kind, **sizes).bfloat16().save_pretrained(plain)
    shutil.copytree(plain, quantised)
    stored, meant = {}, {}
    for name, weight in load_file(plain / "model.safetensors").items():
        parts, meant[name] = quantise(name, weight)
        stored |= parts
    for folder, state in ((plain, meant), (quantised, stored)):
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((plain / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(described | {"quantization_config": settings}))
    return request.param, ask(dequantize=True), quantised, plain


@pytest.mark.parametrize("asked", [False, True])
def test_dequantised_experts_are_plain_ones(saved, asked, tmp_path):
    name, dequantizing, quantised, plain = saved
    settings = {"quantization_config": dequantizing} if asked else {}
    tokens = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(1))
    gradients, merged = [], []
    for folder, given in ((plain, {}), (quantised, settings)):
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **given).eval()
        before = {key: weight.clone() for key, weight in base.state_dict().items()}
        torch.manual_seed(0)
        model = adapt(base)
        model.get_input_embeddings().weight.requires_grad_()  # below all layers
        model(tokens).logits.float().square().mean().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
        adapted = model(tokens).logits
        model.merge_adapter()
        merged.append(model(tokens).logits)
        model.unmerge_adapter()
        assert torch.equal(model(tokens).logits, adapted)
    assert torch.equal(*merged)
    assert not torch.equal(merged[0], adapted)  # the adapted weights are not rounded
    for key, gradient in gradients[1].items():
        assert gradient.any()
        assert torch.equal(gradient, gradients[0][key])
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=rf"is quantised \({name}\): merge into the model"):
        merge_to_folder(quantised, tmp_path / "adapter", tmp_path / "out")
    state = model.unload().state_dict()
    assert all(torch.equal(state[key], weight) for key, weight in before.items())
