"""Helpers of the tuner's tests: models with random adapters, their layers and outputs, edits of saved folders."""

import copy
import json
from contextlib import contextmanager

import torch
import transformers
from peft import HiraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2LMHeadModel

from smoa_kernels.peft import SMoAConfig, SMoALayer

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def is_gpt2(model):
    return isinstance(model, GPT2LMHeadModel)


def config(model=None, **settings):
    defaults = {"r": 5, "num_blocks": 3, "target_modules": "all-linear", "init_weights": False}
    return SMoAConfig(**{**defaults, "fan_in_fan_out": is_gpt2(model), **settings})


def hira_config(model=None, **settings):
    targets = ["c_attn", "c_proj", "c_fc"] if is_gpt2(model) else ["q_proj", "v_proj", "down_proj"]
    defaults = {"r": 4, "target_modules": targets, "init_weights": False}
    return HiraConfig(**{**defaults, "fan_in_fan_out": is_gpt2(model), **settings})


def adapt(model, **settings):
    return get_peft_model(model, config(model, **settings)).eval()


def trained(model, config, folder):
    """Save an adapter in which every trained parameter has changed."""
    model = get_peft_model(model, copy.deepcopy(config))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    model.save_pretrained(folder)
    return model.eval()


def loaded(folder):
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    return getattr(transformers, architecture).from_pretrained(folder, dtype="auto").eval()


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, SMoALayer)}


def layer_list(model):
    return list(layers(model).values())


def logits(model, tokens, **kwargs):
    return model(tokens, **kwargs).logits


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def anatomy(layer):
    """The tensors of a base layer: the bytes of each, and the attributes that hold them."""
    base = layer.get_base_layer()
    weight = getattr(base, layer.parameter_name)
    found = {"attributes": sorted(vars(base)), "of the weight": sorted(vars(weight)), "kind": type(weight)}
    for name in ("data", "qdata", "scale", "SCB"):
        value = getattr(weight, name, None)
        if isinstance(value, torch.Tensor) and type(value) in (torch.Tensor, nn.Parameter):
            found[name] = value.contiguous().view(torch.uint8).cpu().numpy().tobytes()
    return found


@contextmanager
def unchanged(model):
    """The body changes no module, parameter, buffer or configuration of a model."""

    def now():
        found = [(name, type(module)) for name, module in model.named_modules()]
        found += [(name, p.requires_grad) for name, p in model.named_parameters()]
        found += [(name, held.to_dict()) for name, held in getattr(model, "peft_config", {}).items()]
        values = {key: value for key, value in model.state_dict().items() if not value.is_meta}
        found += [(key, value.shape, value.dtype) for key, value in model.state_dict().items()]
        copies = {key: value.detach().clone() for key, value in values.items()}
        return found, {key: value.view(-1).view(torch.uint8) for key, value in copies.items()}

    before, state = now()
    yield
    after, values = now()
    assert after == before
    assert values.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in values.items())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit_config(folder, **values):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_weights(folder, edit):
    """Change a saved adapter's tensors; removes the digest from its configuration."""
    state = load_file(folder / WEIGHTS)
    edit(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    edit_config(folder, weights_sha256=None)


def assert_refused(capsys, command, message, *arguments):
    """The command prints one line and exits with 2."""
    capsys.readouterr()
    assert command(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("smoa-kernels: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
