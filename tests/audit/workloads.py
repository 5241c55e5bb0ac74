"""Every kernel by itself on operands of a key's sizes, for the audit, the emulator and the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from smoa_kernels.definition.dropout import Dropout
from smoa_kernels.definition.experts import reference_experts_linear
from smoa_kernels.definition.packed import PackedAdapter
from smoa_kernels.definition.precision import bmm_in_float32, multiplied_in
from smoa_kernels.definition.reference import delta_weight as defined_delta
from smoa_kernels.definition.reference import factor_gradients
from smoa_kernels.definition.reference import forward as reference_forward
from smoa_kernels.kernels.contract import contract
from smoa_kernels.kernels.fused_linear import fused_linear
from smoa_kernels.kernels.grouped_grad import grouped_grad
from smoa_kernels.kernels.grouped_linear import grouped_linear
from smoa_kernels.kernels.modulate import modulated_blocks, modulated_weight
from smoa_kernels.kernels.permute import gather_columns, scatter_columns
from smoa_kernels.kernels.spec import Config, partial_width
from smoa_kernels.kernels.sum_partials import sum_partials
from smoa_kernels.kernels.table import override

from . import operands

Work: TypeAlias = tuple[Callable[[], Sequence[Tensor]], Callable[[torch.dtype], Sequence[Tensor]]]
"""Two functions: one launches and returns the results, the other computes them by the definition."""


class Operands(operands.Operands):
    """Operands of a key's sizes; tests/kernels stores those of a problem with other strides."""

    bias: Tensor | None = None

    def place(self, tensor: Tensor) -> Tensor:
        """Where an operand lies that another kernel has made."""
        return tensor


@contextmanager
def configured(kernel: str, config: Config | None, precision: str = "fp32") -> Iterator[None]:
    """While active, launch a kernel (under any of its names) with these parameters, and multiply in a precision.

    Without parameters the tables and the heuristic choose.
    """
    family = kernel.removesuffix("_gathered")
    of_family = override(lambda key: config if key.kernel.removesuffix("_gathered") == family else None)
    with multiplied_in(precision), of_family:
        yield


def in_dtype(adapter: Any, dtype: torch.dtype) -> Any:
    """The adapter with its weight and factors in `dtype`."""
    return replace(adapter, weight=adapter.weight.to(dtype), A=adapter.A.to(dtype), B=adapter.B.to(dtype))


def delta_weight(adapter: PackedAdapter, dtype: torch.dtype) -> Tensor:
    """ΔW (N, C) by the definition, computed in `dtype`."""
    return defined_delta(in_dtype(adapter, dtype))


def forward(x: Tensor, bias: Tensor | None, adapter: PackedAdapter, dtype: torch.dtype) -> Tensor:
    """y (T, N) by the definition, computed in `dtype`."""
    bias = None if bias is None else bias.to(dtype)
    return reference_forward(x.to(dtype), bias, in_dtype(adapter, dtype), "auto", None)


def _modulated_weight(operands: Operands) -> Work:
    adapter = operands.adapter()

    def defined(dtype):
        return [adapter.weight.to(dtype) + delta_weight(adapter, dtype)]

    return lambda: [modulated_weight(adapter)], defined


def _modulated_blocks(operands: Operands) -> Work:
    key, adapter = operands.key, operands.adapter()
    p = adapter.partition
    widths = key.padded_out, key.padded_in

    def run() -> list[Tensor]:
        return [modulated_blocks(adapter, widths)]

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

    def run() -> list[Tensor]:
        if blocked is not None:
            return [scatter_columns(blocked, p, x, dropout=dropout)]
        return [gather_columns(x, p, key.padded_in, dropout=dropout)]

    def defined(dtype: torch.dtype) -> list[Tensor]:
        gathered = x.new_zeros(key.tokens, key.blocks, key.padded_in, dtype=dtype)
        kept = x.to(dtype)
        kept = kept * Dropout(seed, 0.1).multiplier(kept) if key.dropout else kept
        for k, size in enumerate(p.col_sizes):
            gathered[:, k, :size] = kept[:, p.cols(k)]
        return [gathered]

    return run, defined


def _fused_linear(operands: Operands) -> Work:
    adapter, bias = operands.adapter(), operands.bias
    x = operands.tensor(operands.key.tokens, operands.key.in_features)
    return lambda: [fused_linear(x, bias, adapter)], lambda dtype: [forward(x, bias, adapter, dtype)]


def _contract(operands: Operands) -> Work:
    key, adapter = operands.key, operands.adapter()
    p = adapter.partition
    x, dy = operands.tensor(key.tokens, key.in_features), operands.tensor(key.tokens, key.out_features)
    sides = (dy, p.T, key.padded_out), (x, p, key.padded_in)
    left, right = (operands.place(gather_columns(*side)).transpose(0, 1) for side in sides)
    G = bmm_in_float32(left.mT, right)
    return (
        lambda: contract(G, adapter),
        lambda dtype: factor_gradients(dy.to(dtype), x.to(dtype), in_dtype(adapter, dtype), None),
    )


def _grouped_linear(operands: Operands) -> Work:
    adapter, ends, x, _ = operands.experts()

    def defined(dtype):
        return [reference_experts_linear(x.to(dtype), ends, in_dtype(adapter, dtype))]

    return lambda: [grouped_linear(x, ends, adapter)], defined


def _grouped_grad(operands: Operands) -> Work:
    adapter, ends, x, dy = operands.experts()

    def defined(dtype: torch.dtype) -> Sequence[Tensor]:
        a = in_dtype(adapter, dtype)
        A, B = a.A.clone().requires_grad_(), a.B.clone().requires_grad_()
        y = reference_experts_linear(x.to(dtype), ends, replace(a, A=A, B=B))
        return torch.autograd.grad(y, (A, B), dy.to(dtype))

    return lambda: grouped_grad(dy, x, ends, adapter), defined


def _sum_partials(operands: Operands) -> Work:
    key, transposed = operands.key, "transposed" in operands.form
    # Rows of y, or of factors. Another kernel's configuration decides the number of parts; this one is typical.
    of_factors = operands.form.startswith("r")
    N = key.rank if of_factors else key.out_features
    partials = operands.tensor(4, key.tokens, partial_width(N) if of_factors else N, dtype=torch.float32)
    out = operands.tensor(*((N, key.tokens) if transposed else (key.tokens, N)))
    bias = operands.tensor(N) if operands.form == "bias" else None

    def run() -> list[Tensor]:
        sum_partials(partials, out, bias=bias, transposed=transposed)
        return [out]

    def defined(dtype: torch.dtype) -> list[Tensor]:
        total = partials.to(dtype).sum(0)[:, :N]
        total = total if bias is None else total + bias.to(dtype)
        return [total.T if transposed else total]

    return run, defined


WORKLOADS: dict[str, Callable[[Operands], Work]] = {
    "modulated_weight": _modulated_weight,
    "modulated_blocks": _modulated_blocks,
    "permute": _permute,
    "fused_linear": _fused_linear,
    "contract": _contract,
    "grouped_linear": _grouped_linear,
    "grouped_linear_gathered": _grouped_linear,
    "grouped_grad": _grouped_grad,
    "grouped_grad_gathered": _grouped_grad,
    "sum_partials": _sum_partials,
}
"""By the kernel's name."""
