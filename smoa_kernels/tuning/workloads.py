"""Every kernel and algorithm on operands of a key's sizes, for the tuner, the audit and the tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from ..backends import triton as backend
from ..backends.kernels_dropout import KernelsDropout
from ..definition.dropout import Dropout
from ..definition.experts import ExpertBlocks, ExpertsAdapter, reference_experts_linear
from ..definition.packed import PackedAdapter
from ..definition.partition import BlockPartition
from ..definition.precision import PRECISIONS
from ..definition.reference import factor_gradients, input_gradient, reference_delta_weight
from ..definition.reference import forward as reference_forward
from ..kernels.block_grad import block_grad
from ..kernels.block_matmul import block_matmul
from ..kernels.fused_linear import fused_linear
from ..kernels.grouped_grad import grouped_grad
from ..kernels.grouped_linear import grouped_linear
from ..kernels.modulate import modulated_blocks, modulated_weight
from ..kernels.permute import gather_columns, scatter_columns
from ..kernels.spec import Key, partial_width
from ..kernels.sum_partials import sum_partials

__all__ = ["WORKLOADS", "Operands", "Work"]

Work: TypeAlias = tuple[Callable[[Any], Sequence[Tensor]], Callable[[torch.dtype], Sequence[Tensor]]]
"""Two functions: one launches with a choice and returns the results, the other computes them by the definition."""


class Operands:
    """A layer of a key's sizes, its blocks cut evenly from granules in random order, and activations.

    Args:
        key: the sizes.
        form: the kernel's form that a launch should take.
        device: of the tensors.
        filled: whether to fill them with random numbers, the same at each call; False is for launches that are only
            captured.
    """

    def __init__(self, key: Key, form: str, device: torch.device, *, filled: bool = True) -> None:
        self.key, self.form, self.device, self.filled = key, form, device, filled
        self.dtype, self.allow_tf32 = PRECISIONS[key.dtype].dtype, key.dtype == "tf32"
        factors = "fp32" if "fp32 factors" in form else key.factors or key.dtype
        self.factor_dtype = PRECISIONS[factors].dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal numbers in the key's dtype, or another."""
        dtype = dtype or self.dtype
        if not self.filled:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return torch.randn(shape, generator=self._generator, device=self.device).to(dtype)

    def labels(self, features: int) -> Tensor:
        """A block for each of `features` coordinates."""
        granules = features // self.key.granule
        even = torch.arange(granules, device=self.device) * self.key.blocks // granules
        order = torch.randperm(granules, generator=self._generator, device=self.device)
        return even[order].repeat_interleave(self.key.granule)

    def partition(self, rows: int, cols: int) -> BlockPartition:
        """A partition of a weight of this shape into the key's blocks."""
        return BlockPartition.from_labels(self.labels(rows), self.labels(cols), self.key.blocks)

    def ranks(self) -> Tensor:
        """The rank of each block: all have the key's."""
        return torch.full((self.key.blocks,), self.key.rank, dtype=torch.int32, device=self.device)

    def adapter(self) -> PackedAdapter:
        """The adapter; for a transposed key the transposed adapter of the layer whose dX is computed."""
        key = self.key
        rows, cols = key.out_features, key.in_features
        if key.transposed:
            rows, cols = cols, rows
        adapter = PackedAdapter(
            weight=self.tensor(rows, cols) / cols**0.5,
            A=self.tensor(key.rank, cols, dtype=self.factor_dtype),
            B=self.tensor(rows, key.rank, dtype=self.factor_dtype) / key.rank**0.5,
            partition=self.partition(rows, cols),
            ranks=self.ranks(),
            scaling=torch.ones((), device=self.device),
        )
        return adapter.T if key.transposed else adapter

    def experts(self) -> tuple[ExpertsAdapter, Tensor, Tensor, Tensor]:
        """An adapter of four experts, the ends of their pairs, x and dY, with `tokens` pairs per expert on average.

        Blocks are contiguous if the form says so; otherwise each expert has its own order.
        """
        key, device, experts = self.key, self.device, 4
        rows, cols = key.out_features, key.in_features
        if key.transposed:
            rows, cols = cols, rows
        row_block, col_block = (
            torch.stack([self.labels(size) for _ in range(experts)]) for size in (rows, cols)
        )
        if "contiguous" in self.form:
            row_block, col_block = row_block.sort(1).values, col_block.sort(1).values
        blocks = ExpertBlocks.from_labels(row_block, col_block, key.blocks)
        adapter = ExpertsAdapter(
            weight=self.tensor(experts, rows, cols) / cols**0.5,
            A=self.tensor(experts, key.rank, cols, dtype=self.factor_dtype),
            B=self.tensor(experts, rows, key.rank, dtype=self.factor_dtype) / key.rank**0.5,
            blocks=blocks,
            ranks=self.ranks(),
            scaling=torch.ones((), device=device),
        )
        if key.transposed:
            adapter = adapter.T
        # The split is uneven: one expert gets nearly all pairs that another lacks.
        pairs = experts * key.tokens
        ends = torch.tensor([key.tokens, 2 * key.tokens + key.tokens // 2, 3 * key.tokens, pairs]).int()
        x, dy = self.tensor(pairs, key.in_features), self.tensor(pairs, key.out_features)
        return adapter, ends.to(device), x, dy


AnAdapter = TypeVar("AnAdapter", PackedAdapter, ExpertsAdapter)


def in_dtype(adapter: AnAdapter, dtype: torch.dtype) -> AnAdapter:
    """The adapter with its weight and factors in `dtype`."""
    return replace(adapter, weight=adapter.weight.to(dtype), A=adapter.A.to(dtype), B=adapter.B.to(dtype))


def delta_weight(adapter: PackedAdapter, dtype: torch.dtype) -> Tensor:
    """ΔW (N, C) by the definition, computed in `dtype`."""
    a = in_dtype(adapter, dtype)
    return reference_delta_weight(a.weight, a.A, a.B, a.partition, a.ranks, scaling=a.scaling)


def forward(x: Tensor, adapter: PackedAdapter, dtype: torch.dtype) -> Tensor:
    """y (T, N) by the definition, computed in `dtype`."""
    return reference_forward(x.to(dtype), None, in_dtype(adapter, dtype), "auto", None)


def _modulated_weight(operands: Operands) -> Work:
    adapter = operands.adapter()

    def run(config: Any) -> list[Tensor]:
        return [modulated_weight(adapter, allow_tf32=operands.allow_tf32, config=config)]

    return run, lambda dtype: [adapter.weight.to(dtype) + delta_weight(adapter, dtype)]


def _modulated_blocks(operands: Operands) -> Work:
    key, adapter = operands.key, operands.adapter()
    p = adapter.partition
    widths = key.padded_out, key.padded_in

    def run(config: Any) -> list[Tensor]:
        return [modulated_blocks(adapter, widths, allow_tf32=operands.allow_tf32, config=config)]

    def defined(dtype: torch.dtype) -> list[Tensor]:
        delta = delta_weight(adapter, dtype)
        blocks = delta.new_zeros(key.blocks, *widths)
        for k in range(key.blocks):
            blocks[k, : p.row_sizes[k], : p.col_sizes[k]] = delta[p.rows(k)][:, p.cols(k)]
        return [blocks]

    return run, defined


def _permute(operands: Operands) -> Work:
    key, scatters = operands.key, "scatter" in operands.form
    x = operands.tensor(key.tokens, key.in_features)
    blocked = operands.tensor(key.tokens, key.blocks, key.padded_in) if scatters else None
    p = operands.partition(key.in_features, key.in_features)
    seed = torch.zeros(1, dtype=torch.int64, device=operands.device)
    dropout = Dropout(seed, 0.1) if key.dropout else None

    def run(config: Any) -> list[Tensor]:
        if blocked is not None:
            return [scatter_columns(blocked, p, x, dropout=dropout, config=config)]
        return [gather_columns(x, p, key.padded_in, dropout=dropout, config=config)]

    def defined(dtype: torch.dtype) -> list[Tensor]:
        gathered = x.new_zeros(key.tokens, key.blocks, key.padded_in, dtype=dtype)
        kept = x.to(dtype)
        kept = kept * KernelsDropout(seed, 0.1).multiplier(kept) if key.dropout else kept
        for k, size in enumerate(p.col_sizes):
            gathered[:, k, :size] = kept[:, p.cols(k)]
        return [gathered]

    return run, defined


def _block_matmul(operands: Operands) -> Work:
    key, adapter = operands.key, operands.adapter()
    x = operands.tensor(key.tokens, key.in_features)
    in_place = key.granule > 1 and not key.dropout
    xg = x if in_place else gather_columns(x, adapter.partition, key.padded_in)
    y = operands.tensor(key.tokens, key.out_features)
    if key.transposed:
        delta = modulated_blocks(adapter.T, (key.padded_in, key.padded_out)).mT
    else:
        delta = modulated_blocks(adapter, (key.padded_out, key.padded_in))

    def run(config: Any) -> list[Tensor]:
        return [block_matmul(xg, adapter, delta, out=y, allow_tf32=operands.allow_tf32, config=config)]

    return run, lambda dtype: [x.to(dtype) @ delta_weight(adapter, dtype).T]


def _fused_linear(operands: Operands) -> Work:
    adapter = operands.adapter()
    x = operands.tensor(operands.key.tokens, operands.key.in_features)

    def run(config: Any) -> list[Tensor]:
        return [fused_linear(x, None, adapter, allow_tf32=operands.allow_tf32, config=config)]

    return run, lambda dtype: [forward(x, adapter, dtype)]


def _block_grad(operands: Operands) -> Work:
    key, adapter = operands.key, operands.adapter()
    p = adapter.partition
    x, dy = operands.tensor(key.tokens, key.in_features), operands.tensor(key.tokens, key.out_features)
    dyg = dy if key.granule > 1 else gather_columns(dy, p.T, key.padded_out)
    xg = x if key.granule > 1 and not key.dropout else gather_columns(x, p, key.padded_in)

    def run(config: Any) -> tuple[Tensor, Tensor]:
        return block_grad(1, lambda _: (dyg, xg), adapter, allow_tf32=operands.allow_tf32, config=config)

    return run, lambda dtype: factor_gradients(dy.to(dtype), x.to(dtype), in_dtype(adapter, dtype), None)


def _grouped_linear(operands: Operands) -> Work:
    adapter, ends, x, _ = operands.experts()

    def run(config: Any) -> list[Tensor]:
        return [grouped_linear(x, ends, adapter, allow_tf32=operands.allow_tf32, config=config)]

    return run, lambda dtype: [reference_experts_linear(x.to(dtype), ends, in_dtype(adapter, dtype))]


def _grouped_grad(operands: Operands) -> Work:
    adapter, ends, x, dy = operands.experts()

    def run(config: Any) -> tuple[Tensor, Tensor]:
        return grouped_grad(dy, x, ends, adapter, allow_tf32=operands.allow_tf32, config=config)

    def defined(dtype: torch.dtype) -> list[Tensor]:
        of_dtype = in_dtype(adapter, dtype)
        A, B = (factor.clone().requires_grad_() for factor in (of_dtype.A, of_dtype.B))
        with torch.enable_grad():
            reference_experts_linear(x.to(dtype), ends, replace(of_dtype, A=A, B=B)).backward(dy.to(dtype))
        assert A.grad is not None
        assert B.grad is not None
        return [A.grad, B.grad]

    return run, defined


def _sum_partials(operands: Operands) -> Work:
    key, transposed = operands.key, "transposed" in operands.form
    # Rows of y, or of factors. Another kernel's configuration decides the number of parts; this one is typical.
    of_factors = operands.form.startswith("r")
    N = key.rank if of_factors else key.out_features
    partials = operands.tensor(4, key.tokens, partial_width(N) if of_factors else N, dtype=torch.float32)
    out = operands.tensor(*((N, key.tokens) if transposed else (key.tokens, N)))
    bias = operands.tensor(N) if operands.form == "bias" else None

    def run(config: Any) -> list[Tensor]:
        sum_partials(partials, out, bias=bias, transposed=transposed, config=config)
        return [out]

    def defined(dtype: torch.dtype) -> list[Tensor]:
        total = partials.to(dtype).sum(0)[:, :N]
        total = total if bias is None else total + bias.to(dtype)
        return [total.T if transposed else total]

    return run, defined


def _forward(operands: Operands) -> Work:
    adapter = operands.adapter()
    x = operands.tensor(operands.key.tokens, operands.key.in_features)

    def run(algorithm: Any) -> list[Tensor]:
        return [backend.forward(x, None, adapter, algorithm, None)]

    return run, lambda dtype: [forward(x, adapter, dtype)]


def _input_gradient(operands: Operands) -> Work:
    adapter = operands.adapter()
    dy = operands.tensor(operands.key.tokens, operands.key.out_features)

    def run(algorithm: Any) -> list[Tensor]:
        return [backend.input_gradient(dy, adapter, algorithm, None)]

    return run, lambda dtype: [input_gradient(dy.to(dtype), in_dtype(adapter, dtype), None)]


def _factor_gradients(operands: Operands) -> Work:
    adapter, key = operands.adapter(), operands.key
    x, dy = operands.tensor(key.tokens, key.in_features), operands.tensor(key.tokens, key.out_features)

    def run(algorithm: Any) -> Sequence[Tensor]:
        return backend.factor_gradients(dy, x, adapter, algorithm, None)

    return run, lambda dtype: factor_gradients(dy.to(dtype), x.to(dtype), in_dtype(adapter, dtype), None)


WORKLOADS: dict[str, Callable[[Operands], Work]] = {
    "modulated_weight": _modulated_weight,
    "modulated_blocks": _modulated_blocks,
    "permute": _permute,
    "block_matmul": _block_matmul,
    "fused_linear": _fused_linear,
    "block_grad": _block_grad,
    "grouped_linear": _grouped_linear,
    "grouped_linear_gathered": _grouped_linear,
    "grouped_grad": _grouped_grad,
    "grouped_grad_gathered": _grouped_grad,
    "sum_partials": _sum_partials,
    "forward": _forward,
    "input_gradient": _input_gradient,
    "factor_gradients": _factor_gradients,
}
"""By the name of a kernel or an algorithm's key."""
