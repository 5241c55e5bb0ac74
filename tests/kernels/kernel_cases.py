"""Every kernel of a layer on a problem: its launches with small tiles, the definition, and the error budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from audit.workloads import WORKLOADS, Operands, Work, configured
from problems import DEVICE, LinearProblem, error_over_budget, relative_error
from torch import Tensor

from smoa_kernels.definition.packed import PackedAdapter
from smoa_kernels.definition.precision import (
    KERNEL_DTYPES,
    KERNEL_PRECISIONS,
    PRECISIONS,
    Precision,
    precision_of,
)
from smoa_kernels.kernels.architectures import ARCHITECTURES, architecture, limits
from smoa_kernels.kernels.registry import KERNELS
from smoa_kernels.kernels.spec import Config, Key, granule_of

CHECKED = ("modulated_weight", "modulated_blocks", "fused_linear", "contract")
"""The kernels of a layer that multiply."""
each_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)

Place = Callable[[Tensor], Tensor]


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def tiles(kernel: str, p: LinearProblem) -> list[Config | None]:
    """Small tiles, so that small problems have several of each kind and a partial last group of tokens."""
    if kernel == "contract":
        return [Config(block_n=16, block_c=32, block_d=16, num_warps=4)]
    # In the interpreter a sum in two parts, and one in one part, which adds the bias.
    return [config for config, _ in shipped_here(kernel)[1:3]] if kernel == "fused_linear" else [None]


def widths(p: LinearProblem) -> tuple[int, int]:
    """The largest block of rows and of columns, rounded up to no whole tile."""
    rows, cols = (-(-max(sizes) // 8) * 8 for sizes in (p.partition.row_sizes, p.partition.col_sizes))
    return rows, cols


class Placed(Operands):
    """A problem's operands; each passes through `place` (strides, guards)."""

    def __init__(self, p: LinearProblem, place: Place) -> None:
        blocks = p.partition
        sizes = len(p.A), blocks.num_blocks, *blocks.shape, len(p.x)
        granule = granule_of(blocks.granularity, blocks.shape)
        dtype = precision_of(p.x.dtype, ieee=True).name
        super().__init__(Key("", dtype, *sizes, *widths(p), granule=granule), "", p.x.device)
        self._problem, self._place, self._activations = p, place, iter((p.x, p.dy))
        self.bias = p.bias

    def place(self, tensor: Tensor) -> Tensor:
        return self._place(tensor)

    def adapter(self) -> PackedAdapter:
        return self._problem.adapter(self._place)

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """x, and then dY."""
        return self._place(next(self._activations).clone())


def transposed(p: LinearProblem) -> LinearProblem:
    """The problem whose output is dX."""
    return replace(p, x=p.dy, dy=p.x, weight=p.weight.T, bias=None, A=p.B.T, B=p.A.T, partition=p.partition.T)


def works(kernel: str, p: LinearProblem, place: Place = as_it_is) -> Iterator[tuple[LinearProblem, Work]]:
    """A kernel's workload on a problem, and that of dX where the kernel computes it too."""
    for side in (p, transposed(p)) if kernel == "fused_linear" else (p,):
        yield side, WORKLOADS[kernel](Placed(side, place))


def results(kernel: str, p: LinearProblem, place: Place = as_it_is) -> list[Tensor]:
    """The results of these workloads."""
    with configured(kernel, tiles(kernel, p)[-1]):
        return [result for _, (run, _) in works(kernel, p, place) for result in run()]


def check(
    kernel: str, problem: LinearProblem, dtype: torch.dtype, factor_dtype: torch.dtype | None = None
) -> None:
    """Asserts that a kernel's results on a problem, rounded to these dtypes, are within their budgets."""
    for p, (run, defined) in works(kernel, problem.to(dtype, factor_dtype)):
        exact = p.to(torch.float64)
        same, truth = defined(dtype), defined(torch.float64)
        least = [0.0] * len(truth)
        if kernel == "contract":  # its results have the factors' dtype
            # A short sum may be exact by luck in the reference, so four float32 roundings of the terms are allowed.
            sizes = {name: getattr(exact, name).abs() for name in ("x", "weight", "A", "B", "dy")}
            least = [4 * 2**-23 * terms for terms in replace(exact, **sizes).run_reference()[2:4]]
            same = p.run_reference()[2:4]
        for config in tiles(kernel, p):
            with configured(kernel, config):
                found = run()
            for ours, reference, true, allowed in zip(found, same, truth, least, strict=True):
                if ((ours.double() - true).abs() > allowed).any():
                    assert_within_budget(ours, reference, true)


def assert_within_budget(ours: Tensor, reference: Tensor, truth: Tensor) -> None:
    """`err(ours) ≤ 2 · err(same-dtype reference) + tiny`, both against the float64 truth."""
    assert ours.dtype == reference.dtype
    assert ours.shape == truth.shape
    assert error_over_budget(ours, reference, truth) <= 1


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
        for config in KERNELS[kernel].shipped(limits(arch), PRECISIONS[name])
    ]
    if interpreted:
        pairs = [(config, PRECISIONS["fp32"]) for config, _ in pairs]
    return list(dict.fromkeys(pairs))


def assert_within_its_rounding(precision: Precision, ours: Tensor, reference: Tensor, truth: Tensor) -> None:
    """Asserts the budget. TF32 keeps only 10 bits of each operand, so it gets a limit of its own."""
    if precision.name == "tf32":
        assert relative_error(ours, truth) < 2**-9
    else:
        assert_within_budget(ours, reference, truth)


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
