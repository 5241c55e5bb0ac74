"""Where the kernels run, and memory that shows what they leave unwritten or read too far."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one, else CPU tensors under Triton's interpreter (tests/conftest.py)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty` and its relatives return with NaN: an element left unwritten shows."""

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


class Guarded:
    """Tensors inside larger allocations whose margins hold NaN, checked untouched when the test ends."""

    margin = 64

    def __init__(self) -> None:
        self._margins: list[tuple[Tensor, Tensor]] = []

    def __call__(self, tensor: Tensor, *, row_padding: int = 0) -> Tensor:
        """A copy of `tensor` with its own stride order, its slowest stride `row_padding` larger, guarded."""
        order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
        strides, extent = [0] * tensor.ndim, 1
        for step, dim in enumerate(reversed(order)):
            if step and step == tensor.ndim - 1:
                extent += row_padding
            strides[dim] = extent
            extent *= max(tensor.shape[dim], 1)
        storage = torch.zeros(extent + 2 * self.margin, dtype=tensor.dtype, device=tensor.device)
        storage.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)
        view = storage.as_strided(tensor.shape, strides, self.margin)
        outside = torch.ones_like(storage, dtype=torch.bool)
        outside.as_strided(tensor.shape, strides, self.margin).fill_(False)
        view.copy_(tensor)
        self._margins.append((storage, outside))
        return view

    def check(self) -> None:
        for storage, outside in self._margins:
            margin = storage[outside]
            if storage.is_floating_point():
                assert bool(margin.isnan().all())
            else:
                assert bool((margin == torch.iinfo(storage.dtype).max).all())


@pytest.fixture
def guarded() -> Iterator[Guarded]:
    guard = Guarded()
    yield guard
    guard.check()
