"""Helpers of the tuner's tests: models with random adapters, their layers and outputs, edits of saved folders."""

import json
from contextlib import contextmanager

import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from smoa_kernels.definition.packed import padding_masks
from smoa_kernels.peft import SMoAConfig, SMoALayer

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def config(model=None, **settings):
    conv1d = model is not None and model.config.model_type == "gpt2"
    defaults = {"r": 5, "num_blocks": 3, "target_modules": "all-linear", "init_weights": False}
    return SMoAConfig(**{**defaults, "fan_in_fan_out": conv1d, **settings})


def adapt(model, **settings):
    return get_peft_model(model, config(model, **settings)).eval()


def gentle(model, **settings):
    """A configuration whose random adapters change the model's outputs a little."""
    return config(model, **{"r": 8, "num_blocks": 2, "smoa_alpha": 0.5, **settings})


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, SMoALayer)}


def layer_list(model):
    return list(layers(model).values())


def logits(model, tokens, **kwargs):
    return model(tokens, **kwargs).logits


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def nudge(model, scale=0.3):
    """Add noise to the weights, as training would; padding stays zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in layers(model).values():
            for name, B in layer.smoa_B.items():
                _, mask = padding_masks(layer.partition(name), layer.ranks(name), B.shape[1])
                drawn = torch.randn(B.shape, generator=generator, device="cpu").to(B.device)
                B.copy_(drawn * scale * mask)


@contextmanager
def unchanged(model):
    """The body changes no module, parameter, buffer or configuration of a model."""

    def now():
        found = [(name, type(module)) for name, module in model.named_modules()]
        found += [(name, p.requires_grad) for name, p in model.named_parameters()]
        found += [(name, held.to_dict()) for name, held in getattr(model, "peft_config", {}).items()]
        values = {key: value for key, value in model.state_dict().items() if not value.is_meta}
        found += [(key, value.shape, value.dtype) for key, value in model.state_dict().items()]
        return found, {
            key: value.detach().clone().view(-1).view(torch.uint8) for key, value in values.items()
        }

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
