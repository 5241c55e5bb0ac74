"""Adapters for the kernels' tests: `problems.make_problem` on the kernels' device, and the error budget."""

from __future__ import annotations

from collections.abc import Callable

import torch
from problems import LinearProblem, error_over_budget
from torch import Tensor
from vectors import Vector

from smoa_kernels.packed import PackedAdapter
from smoa_kernels.partition import BlockPartition
from smoa_kernels.reference import reference_delta_weight, reference_linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def from_vector(vector: Vector) -> LinearProblem:
    """A stored vector of the definition, in float64."""
    return LinearProblem(
        x=torch.from_numpy(vector.x),
        weight=torch.from_numpy(vector.weight),
        bias=torch.from_numpy(vector.bias),
        A=torch.from_numpy(vector.A),
        B=torch.from_numpy(vector.B),
        partition=BlockPartition.from_labels(
            torch.from_numpy(vector.row_block), torch.from_numpy(vector.col_block), vector.num_blocks
        ),
        ranks=torch.from_numpy(vector.ranks).int(),
        dy=torch.from_numpy(vector.dy),
        scaling=vector.scaling,
    )


def adapter_of(problem: LinearProblem, place: Callable[[Tensor], Tensor] = lambda t: t) -> PackedAdapter:
    """The packed adapter of a problem, each floating tensor passed through `place` (strides, guards)."""
    scaling = torch.tensor(problem.scaling, dtype=torch.float32, device=problem.weight.device)
    return PackedAdapter(
        place(problem.weight), place(problem.A), place(problem.B), problem.partition, problem.ranks, scaling
    )


def delta_weight(problem: LinearProblem) -> Tensor:
    """ΔW by the definition, in the problem's dtype."""
    p = problem
    return reference_delta_weight(p.weight, p.A, p.B, p.partition, p.ranks, scaling=p.scaling)


def linear(problem: LinearProblem) -> Tensor:
    """y by the definition, in the problem's dtype."""
    p = problem
    return reference_linear(p.x, p.weight, p.bias, p.A, p.B, p.partition, p.ranks, scaling=p.scaling)


def assert_within_budget(ours: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """`err(ours) ≤ 2 · err(same-dtype reference) + tiny`, both against the float64 truth."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == truth.shape
    assert error_over_budget(ours, theirs, truth) <= 1


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
