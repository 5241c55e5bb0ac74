"""Settings of the whole test process."""

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

# Triton reads it when a kernel is defined, so it is set before any kernel is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _on_the_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """A numerical test makes its tensors and layers on the GPU where there is one."""
    from problems import DEVICE  # imports the kernels

    if DEVICE.type == "cpu" or request.node.get_closest_marker("numerical") is None:
        yield
    else:
        with DEVICE:
            yield


# How many problems, folders or tables a fuzzed file draws in all: `make nightly` takes the second.
if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import settings

    settings.register_profile("ci", max_examples=300, deadline=None)
    settings.register_profile("nightly", max_examples=10_000, deadline=None)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
