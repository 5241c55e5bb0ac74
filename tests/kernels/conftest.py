"""Where the kernels run, and memory that shows what they leave unwritten or read too far."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernel_cases import Guarded
from problems import DEVICE
from torch import Tensor


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one, else CPU tensors under Triton's interpreter (tests/conftest.py)."""
    return DEVICE


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty` and its relatives return with NaN: an element left unwritten shows."""
    with torch.device("cpu"):
        torch.empty(
            0
        )  # what a default device applies to, torch notes once: the functions that are replaced here

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return filled

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
        (Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def guarded() -> Iterator[Guarded]:
    guard = Guarded()
    yield guard
    guard.check()
