"""Fixtures of the PEFT tests."""

import peft
import pytest
import torch
from adapted import adapt, config, logits, trained
from packaging.version import Version
from tiny_models import tiny_gpt2, tiny_llama
from transformers.integrations import peft as integration


@pytest.fixture
def llama():
    return tiny_llama


@pytest.fixture
def gpt2():
    return tiny_gpt2


@pytest.fixture(params=[tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def make_model(request):
    """A function that makes the same base model each time."""
    return request.param


@pytest.fixture
def tokens():
    drawn = torch.randint(0, 64, (3, 7), device="cpu", generator=torch.Generator().manual_seed(1))
    return drawn.to(torch.get_default_device())


@pytest.fixture
def folder(make_model, tokens, tmp_path):
    """A saved adapter with random weights, and its outputs."""
    base = make_model()
    torch.manual_seed(5)  # other factors than adapters get that are added right after the base is made
    model = adapt(base)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        return tmp_path / "adapter", logits(model, tokens)


@pytest.fixture
def folders(tmp_path):
    """The folders of a base and of an adapter that looks trained."""
    tiny_llama().save_pretrained(tmp_path / "base")
    trained(tiny_llama(), config(target_modules=["q_proj", "down_proj"]), tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


@pytest.fixture(scope="session")
def quantizable(tmp_path_factory):
    """A folder of a base whose layers every library can quantise. Those of the MLP have biases."""
    folder = tmp_path_factory.mktemp("base")
    model = tiny_llama(hidden_size=64, intermediate_size=128, mlp_bias=True)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.up_proj.bias)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def transformers_adapters(monkeypatch):
    """transformers' own adapter methods, even if they require an unreleased PEFT; all they call exists already.

    5.24.0 requires PEFT 0.22, and the index has 0.21.2. Up to 5.23 nothing is changed.
    """
    if Version(peft.__version__) < Version(integration.MIN_PEFT_VERSION):
        monkeypatch.setattr(integration, "MIN_PEFT_VERSION", peft.__version__)
