"""What is run and checked for a key: seeded operands of its sizes, a launch for each choice, and the truth.

A choice whose numbers are wrong is never timed: its error against the definition in float64 may be at most twice that
of the definition in the kernel's own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..backends import triton as triton_backend
from ..cost.grad_tiling import partial_width
from ..definition.packed import PackedAdapter
from ..definition.partition import BlockPartition
from ..definition.precision import PRECISIONS
from ..definition.reference import backward as reference_backward
from ..definition.reference import forward as reference_forward
from ..definition.reference import reference_delta_weight
from ..kernels.block_grad import block_grad, sum_partials
from ..kernels.block_matmul import block_matmul, block_ordered
from ..kernels.fused_linear import fused_linear, sum_parts
from ..kernels.heuristic import Key
from ..kernels.modulate import modulated_blocks, modulated_weight
from ..kernels.permute import gather_columns

__all__ = ["Workload", "WrongNumbersError", "workload"]


class WrongNumbersError(ArithmeticError):
    """A choice computes something else than the definition."""


@dataclass(frozen=True)
class Workload:
    """One key's operands and what to do with them.

    Attributes:
        key: the problem.
        run: launches with a choice and returns what was computed.
        defined: the same by the definition, with the operands in a dtype.
    """

    key: Key
    run: Callable[[Any], Sequence[Tensor]]
    defined: Callable[[torch.dtype], Sequence[Tensor]]

    def prepare(self) -> None:
        """Compute what results are compared with, once; it needs more memory than any choice does."""
        _ = self._expected

    def check(self, choice: Any) -> None:
        """Run once and compare.

        Raises:
            WrongNumbersError: naming the error and what was allowed.
        """
        for value, truth, allowed in zip(self.run(choice), *self._expected, strict=True):
            error = _relative(value.double(), truth)
            if not error <= allowed:
                raise WrongNumbersError(f"wrong numbers: relative error {error:.1e}, at most {allowed:.1e}")

    @contextmanager
    def precision(self) -> Iterator[None]:
        """PyTorch's own float32 products as the key has them: in TF32 or in IEEE."""
        matmul = torch.backends.cuda.matmul
        before = matmul.fp32_precision
        matmul.fp32_precision = "tf32" if self.key.dtype == "tf32" else "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before

    @cached_property
    def _expected(self) -> tuple[Sequence[Tensor], Sequence[float]]:
        exact = self.defined(torch.float64)
        precision = PRECISIONS[self.key.dtype]
        same = self.defined(precision.dtype)
        budgets = [2 * _relative(s.double(), t) + precision.floor for s, t in zip(same, exact, strict=True)]
        return exact, budgets


def _relative(value: Tensor, truth: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(truth))
    error = float(torch.linalg.vector_norm(value - truth))
    return error / norm if norm else error


def workload(key: Key, device: torch.device) -> Workload:
    """Operands on `device` for a key, the same at each call; padded widths are those that the backend would give."""
    return _WORKLOADS[key.kernel](key, _Operands(key, device))


class _Operands:
    """A layer of a key's sizes, its blocks cut evenly from coordinates in random order, and activations."""

    def __init__(self, key: Key, device: torch.device) -> None:
        self.key, self.device = key, device
        self.dtype, self.allow_tf32 = PRECISIONS[key.dtype].dtype, key.dtype == "tf32"
        self._generator = torch.Generator(device).manual_seed(0)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, device=self.device).to(self.dtype)

    def labels(self, features: int) -> Tensor:
        even = torch.arange(features, device=self.device) * self.key.blocks // features
        return even[torch.randperm(features, generator=self._generator, device=self.device)]

    def partition(self, rows: int, cols: int) -> BlockPartition:
        return BlockPartition.from_labels(self.labels(rows), self.labels(cols), self.key.blocks)

    def adapter(self) -> PackedAdapter:
        """W_eff's parts; for a transposed key those of the layer whose dX it is, seen from dX's side."""
        key = self.key
        rows, cols = key.out_features, key.in_features
        if key.transposed:
            rows, cols = cols, rows
        adapter = PackedAdapter(
            weight=self.randn(rows, cols) / cols**0.5,
            A=self.randn(key.rank, cols),
            B=self.randn(rows, key.rank) / key.rank**0.5,
            partition=self.partition(rows, cols),
            ranks=torch.full((key.blocks,), key.rank, dtype=torch.int32, device=self.device),
            scaling=torch.ones((), device=self.device),
        )
        return adapter.T if key.transposed else adapter


def _in(adapter: PackedAdapter, dtype: torch.dtype) -> PackedAdapter:
    return replace(adapter, weight=adapter.weight.to(dtype), A=adapter.A.to(dtype), B=adapter.B.to(dtype))


def _delta(adapter: PackedAdapter, dtype: torch.dtype) -> Tensor:
    """ΔW (N, C) by the definition."""
    a = _in(adapter, dtype)
    return reference_delta_weight(a.weight, a.A, a.B, a.partition, a.ranks, scaling=a.scaling)


def _modulated_weight(key: Key, operands: _Operands) -> Workload:
    adapter = operands.adapter()
    return Workload(
        key,
        lambda config: [modulated_weight(adapter, allow_tf32=operands.allow_tf32, config=config)],
        lambda dtype: [adapter.weight.to(dtype) + _delta(adapter, dtype)],
    )


def _modulated_blocks(key: Key, operands: _Operands) -> Workload:
    adapter = operands.adapter()
    # A multiple that the width already is: the layout that the key names, whatever multiple made it.
    widths = {"row_multiple": key.padded_out, "col_multiple": key.padded_in}
    return Workload(
        key,
        lambda config: [modulated_blocks(adapter, **widths, allow_tf32=operands.allow_tf32, config=config)],
        lambda dtype: [block_ordered(replace(adapter, weight=_delta(adapter, dtype)), **widths)],
    )


def _permute(key: Key, operands: _Operands) -> Workload:
    x = operands.randn(key.tokens, key.in_features)
    labels = operands.labels(key.in_features)
    p = BlockPartition.from_labels(labels, labels, key.blocks)

    def defined(dtype: torch.dtype) -> list[Tensor]:
        gathered = x.new_zeros(key.tokens, key.blocks, key.padded_in, dtype=dtype)
        for k in range(key.blocks):
            gathered[:, k, : p.col_sizes[k]] = x[:, p.cols(k)].to(dtype)
        return [gathered]

    return Workload(
        key,
        lambda config: [gather_columns(x, p.col_index, p.col_offsets, key.padded_in, config=config)],
        defined,
    )


def _block_matmul(key: Key, operands: _Operands) -> Workload:
    adapter = operands.adapter()
    x = operands.randn(key.tokens, key.in_features)
    p = adapter.partition
    xg = gather_columns(x, p.col_index, p.col_offsets, key.padded_in)
    y = x.new_empty(key.tokens, key.out_features)
    if key.transposed:
        delta = modulated_blocks(adapter.T, row_multiple=key.padded_in, col_multiple=key.padded_out).mT
    else:
        delta = modulated_blocks(adapter, row_multiple=key.padded_out, col_multiple=key.padded_in)
    return Workload(
        key,
        lambda config: [
            block_matmul(xg, adapter, delta, out=y, allow_tf32=operands.allow_tf32, config=config)
        ],
        lambda dtype: [x.to(dtype) @ _delta(adapter, dtype).T],
    )


def _fused_linear(key: Key, operands: _Operands) -> Workload:
    adapter = operands.adapter()
    x = operands.randn(key.tokens, key.in_features)
    return Workload(
        key,
        lambda config: [fused_linear(x, None, adapter, allow_tf32=operands.allow_tf32, config=config)],
        lambda dtype: [reference_forward(x.to(dtype), None, _in(adapter, dtype), "auto", None)],
    )


def _block_grad(key: Key, operands: _Operands) -> Workload:
    adapter = operands.adapter()
    x, dy = operands.randn(key.tokens, key.in_features), operands.randn(key.tokens, key.out_features)
    p = adapter.partition
    xg = gather_columns(x, p.col_index, p.col_offsets, key.padded_in)
    dyg = gather_columns(dy, p.row_index, p.row_offsets, key.padded_out)

    def run(config: Any) -> list[Tensor]:
        dA, dB = block_grad(dyg, xg, adapter, allow_tf32=operands.allow_tf32, config=config)
        assert dA is not None
        assert dB is not None
        return [dA, dB]

    def defined(dtype: torch.dtype) -> list[Tensor]:
        _, dA, dB = reference_backward(dy.to(dtype), x.to(dtype), _in(adapter, dtype), None, needs_x=False)
        assert dA is not None
        assert dB is not None
        return [dA, dB]

    return Workload(key, run, defined)


# How many partial results a launch sums is decided by another kernel's parameters: a typical number.
_PARTS, _SPLITS = 4, 2


def _sum_parts(key: Key, operands: _Operands) -> Workload:
    shape = (_PARTS, key.tokens, key.out_features)
    parts = operands.randn(*shape).float()
    out = parts.new_empty(shape[1:], dtype=operands.dtype)

    def run(config: Any) -> list[Tensor]:
        sum_parts(parts, None, out, config=config)
        return [out]

    return Workload(key, run, lambda dtype: [parts.to(dtype).sum(0)])


def _sum_partials(key: Key, operands: _Operands) -> Workload:
    tile = min(key.padded_in, 128)
    tiles = key.padded_in // tile
    p = operands.partition(key.out_features, key.in_features)
    partial = operands.randn(_SPLITS * tiles, key.out_features, partial_width(key.rank)).float()
    # A block writes as many tiles as its other side fills; the rest is never read.
    sizes = p.col_offsets.diff()[p.row_block.long()]
    written = tile * torch.arange(tiles, device=partial.device)[:, None] < sizes
    ranks = torch.full((key.blocks,), key.rank, dtype=torch.int32, device=partial.device)
    out = partial.new_empty(key.out_features, key.rank, dtype=operands.dtype)

    def run(config: Any) -> list[Tensor]:
        sum_partials(partial, p, ranks, out, _SPLITS, tile, config=config)
        return [out]

    def defined(dtype: torch.dtype) -> list[Tensor]:
        summed = torch.where(written.repeat(_SPLITS, 1)[:, :, None], partial.to(dtype), 0).sum(0)
        return [summed[:, : key.rank]]

    return Workload(key, run, defined)


def _forward(key: Key, operands: _Operands) -> Workload:
    adapter = operands.adapter()
    x = operands.randn(key.tokens, key.in_features)
    return Workload(
        key,
        lambda algorithm: [triton_backend.forward(x, None, adapter, algorithm, None)],
        lambda dtype: [reference_forward(x.to(dtype), None, _in(adapter, dtype), "auto", None)],
    )


def _input_gradient(key: Key, operands: _Operands) -> Workload:
    adapter = operands.adapter()
    dy = operands.randn(key.tokens, key.out_features)

    def defined(dtype: torch.dtype) -> list[Tensor]:
        dx, _, _ = reference_backward(dy.to(dtype), None, _in(adapter, dtype), None, needs_x=True)
        assert dx is not None
        return [dx]

    return Workload(
        key, lambda algorithm: [triton_backend.input_gradient(dy, adapter, algorithm, None)], defined
    )


_WORKLOADS: dict[str, Callable[[Key, _Operands], Workload]] = {
    "modulated_weight": _modulated_weight,
    "modulated_blocks": _modulated_blocks,
    "permute": _permute,
    "block_matmul": _block_matmul,
    "fused_linear": _fused_linear,
    "block_grad": _block_grad,
    "sum_parts": _sum_parts,
    "sum_partials": _sum_partials,
    "forward": _forward,
    "input_gradient": _input_gradient,
}
