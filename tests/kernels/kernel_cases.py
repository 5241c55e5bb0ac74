"""Adapters for the kernels' tests: `problems.make_problem` on the kernels' device, and the error budget."""

from __future__ import annotations

import pytest
import torch
from problems import DEVICE, error_over_budget, relative_error
from torch import Tensor

from smoa_kernels.definition.precision import KERNEL_DTYPES, KERNEL_PRECISIONS, PRECISIONS, Precision
from smoa_kernels.kernels import KERNELS
from smoa_kernels.kernels.architectures import ARCHITECTURES, architecture, facts
from smoa_kernels.kernels.spec import Config

each_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)


def padded_width(sizes: tuple[int, ...], multiple: int) -> int:
    """The largest block, rounded up to a multiple of a test's small tile."""
    return -(-max(sizes) // multiple) * multiple


def assert_within_budget(ours: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """`err(ours) ≤ 2 · err(same-dtype reference) + tiny`, both against the float64 truth."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == truth.shape
    assert error_over_budget(ours, theirs, truth) <= 1


def shipped_here(kernel: str) -> list[tuple[Config, Precision]]:
    """The configurations that ship for this GPU, each with a precision; in the interpreter all of them, in float32.

    Configurations of other architectures or dtypes may need more shared memory than this GPU has.
    """
    interpreted = architecture(DEVICE) == "cpu"
    here = list(ARCHITECTURES) if interpreted else [architecture(DEVICE)]
    pairs = [
        (config, PRECISIONS[name])
        for name in KERNEL_PRECISIONS
        if name != "tf32" or torch.version.hip is None
        for arch in here
        for config in KERNELS[kernel].shipped(facts(arch), PRECISIONS[name])
    ]
    if interpreted:
        pairs = [(config, PRECISIONS["fp32"]) for config, _ in pairs]
    return list(dict.fromkeys(pairs))


def assert_within_its_rounding(precision: Precision, ours: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """Asserts the budget. TF32 keeps only 10 bits of each operand, so it gets a limit of its own."""
    if precision.name == "tf32":
        assert relative_error(ours, truth) < 2**-9
    else:
        assert_within_budget(ours, theirs, truth)


def need_memory(device: torch.device, gigabytes: float) -> None:
    """Skip if the GPU has too little free memory. On the CPU, untouched pages cost nothing."""
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of the GPU's memory")


def far_apart(tensor: Tensor, stride: int, filled: bool = True) -> Tensor:
    """A copy (or empty storage) whose first dimension has this stride; most of its memory is never touched."""
    bytes_in_all = tensor.itemsize * ((len(tensor) - 1) * stride + tensor[0].numel())
    need_memory(tensor.device, bytes_in_all / 1e9)
    storage = torch.zeros(1, dtype=tensor.dtype, device=tensor.device)
    storage.untyped_storage().resize_(bytes_in_all)
    apart = storage.as_strided(tensor.shape, (stride, *tensor.stride()[1:]))
    return apart.copy_(tensor) if filled else apart


class Guarded:
    """Tensors inside larger allocations with NaN margins; the margins are checked when the test ends."""

    margin = 64

    def __init__(self) -> None:
        self._margins: list[tuple[Tensor, Tensor]] = []

    def __call__(self, tensor: Tensor, *, row_padding: int = 0) -> Tensor:
        """A guarded copy of `tensor` in the same stride order; its largest stride grows by `row_padding`."""
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
