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


if importlib.util.find_spec("hypothesis") is not None:
    from draws import PROFILES
    from hypothesis import settings

    for profile, number in PROFILES.items():
        settings.register_profile(profile, max_examples=number, deadline=None)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
