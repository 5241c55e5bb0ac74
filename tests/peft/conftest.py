"""Fixtures of the PEFT tests."""

import pytest
import torch
from tiny_models import tiny_gpt2, tiny_llama


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
