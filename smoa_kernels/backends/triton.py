"""Backend "triton": Triton's kernels do what is bound by memory, cuBLAS every product.

- merged: `modulate` builds W_eff, one GEMM multiplies by it;
- split: `modulate` builds ΔW's blocks, one batched GEMM multiplies by them, and the base GEMM accumulates onto its
  result and rounds once. Blocks that are slices of one size are multiplied where they lie; else `permute` gathers x by
  block and scatters the result;
- fused: for few tokens, base and adapter in one pass over W0; nothing is built. A sum of a single term (C = 1;
  for dX N = 1) is not fused: Triton 3.6 then removes the loop and clears the sum after wgmma.fence, which Hopper does
  not allow (emulated). Triton 3.9 does not.

Backward: a batched GEMM computes `G_k = dY_kᵀ X_k` in float32, and `contract` dA and dB from it. G and the gathered
copies are freed before dX needs its workspace. dX is computed like y, by the transposed adapter; split under dropout.

Experts: one launch computes all of them. Nothing of W0's size is built, and the host does not wait for `ends`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..definition.dropout import Dropout
from ..definition.experts import ExpertsAdapter
from ..definition.packed import PackedAdapter
from ..definition.partition import BlockPartition
from ..definition.precision import accumulate, bmm_in_float32
from ..kernels import modulate, table
from ..kernels.architectures import architecture
from ..kernels.contract import contract
from ..kernels.fused_linear import fused_linear
from ..kernels.grouped_grad import grouped_grad
from ..kernels.grouped_linear import grouped_linear
from ..kernels.launch import Layout, Operands, on_device, operands_of
from ..kernels.modulate import modulated_blocks
from ..kernels.permute import gather_columns, scatter_columns
from ..kernels.spec import GRANULE, Key, block_width, bucket
from . import Gradients, eager
from .algorithms import choose_algorithm

ALGORITHMS = ("merged", "split", "fused")


def forward(
    x: Tensor, bias: Tensor | None, adapter: PackedAdapter, algorithm: str, dropout: Dropout | None
) -> Tensor:
    """`y = x W0ᵀ + b + dropout(x) ΔWᵀ`: x (T, C) -> y (T, N) in x's dtype, which is W0's."""
    if not adapter.weight.numel():  # no tile for a kernel
        return eager.forward(x, bias, adapter, "auto", dropout)
    with on_device(x.device):
        return _forward(x, bias, adapter, algorithm, dropout)


def _forward(
    x: Tensor, bias: Tensor | None, adapter: PackedAdapter, algorithm: str, dropout: Dropout | None
) -> Tensor:
    operands = operands_of(adapter)
    if algorithm == "auto":
        algorithm = "split" if dropout is not None else _chosen("forward", x, adapter, operands)
    if algorithm == "merged":
        return F.linear(x, modulate.modulated_weight(adapter, operands), bias)
    if algorithm == "fused" and adapter.weight.shape[1] > 1:
        return fused_linear(x, bias, adapter)
    partition = adapter.partition
    y = _block_products(_by_block(x, partition, dropout), _delta_blocks(adapter).mT, partition.T)
    accumulate(y, x, adapter.weight)
    # The bias comes last: in a sum with it, before the base GEMM, the adapter's output would be rounded away.
    return y if bias is None else y.add_(bias)


def backward(
    dy: Tensor, x: Tensor | None, adapter: PackedAdapter, dropout: Dropout | None, *, needs_x: bool
) -> Gradients:
    """Gradients (dX, dA, dB) of :func:`forward`: dX where `needs_x`, dA and dB where x is given."""
    if not adapter.weight.numel():
        return eager.backward(dy, x, adapter, dropout, needs_x=needs_x)
    dA = dB = dx = None
    with on_device(dy.device):
        operands = operands_of(adapter)
        # dA and dB come first, so that their gathered copies are freed before dX takes its workspace.
        if x is not None:
            dA, dB = factor_gradients(dy, x, adapter, operands, dropout)
        if needs_x:
            dx = input_gradient(dy, adapter, operands, dropout)
    return dx, dA, dB


def experts_forward(x: Tensor, ends: Tensor, adapter: ExpertsAdapter) -> Tensor:
    """`y_p = x_p W_effᵀ` with the W_eff of pair p's expert: x (P, C) -> y (P, N) in x's dtype."""
    with on_device(x.device):
        return grouped_linear(x, ends, adapter)


def experts_backward(
    dy: Tensor, x: Tensor | None, ends: Tensor, adapter: ExpertsAdapter, *, needs_x: bool
) -> Gradients:
    """Gradients (dX, dA, dB) of :func:`experts_forward`: dX where `needs_x`, dA and dB where x is given."""
    with on_device(dy.device):
        dA, dB = (None, None) if x is None else grouped_grad(dy, x, ends, adapter)
        return grouped_linear(dy, ends, adapter.T) if needs_x else None, dA, dB


def modulated_weight(adapter: PackedAdapter) -> Tensor:
    """`W_eff`, (N, C) in W0's dtype."""
    with on_device(adapter.weight.device):
        return modulate.modulated_weight(adapter, ieee=True)


def factor_gradients(
    dy: Tensor, x: Tensor, adapter: PackedAdapter, operands: Operands, dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    """(dA, dB). On the current device."""
    partition = adapter.partition
    G = bmm_in_float32(_by_block(dy, partition.T).mT, _by_block(x, partition, dropout))
    return contract(G, adapter, operands)


def input_gradient(dy: Tensor, adapter: PackedAdapter, operands: Operands, dropout: Dropout | None) -> Tensor:
    """`dX = dY W0 + dropoutᵀ(dY ΔW)`: dY (T, N) -> dX (T, C), split under dropout. On the current device."""
    algorithm = "split" if dropout is not None else _chosen("input_gradient", dy, adapter, operands)
    if algorithm == "merged":
        return torch.mm(dy, modulate.modulated_weight(adapter, operands))
    if algorithm == "fused" and adapter.weight.shape[0] > 1:
        return fused_linear(dy, None, adapter.T)
    partition = adapter.partition
    dx = _block_products(_by_block(dy, partition.T), _delta_blocks(adapter), partition, dropout)
    return accumulate(dx, dy, adapter.weight.T)


def _by_block(x: Tensor, partition: BlockPartition, dropout: Dropout | None = None) -> Tensor:
    """x's columns grouped by block, (K, T, P): a view where blocks are slices and nothing is masked, else a copy."""
    if dropout is None and partition.is_even:
        return _slices(x, partition)
    return gather_columns(x, partition, _width(partition), dropout=dropout).transpose(0, 1)


def _block_products(
    x: Tensor, delta: Tensor, partition: BlockPartition, dropout: Dropout | None = None
) -> Tensor:
    """Every block's x (K, T, P) times its delta (K, P, Q), at its own columns of the result: those of `partition`."""
    blocks, tokens, _ = x.shape
    y = x.new_empty(tokens, partition.shape[1])
    if dropout is None and partition.is_even:
        torch.bmm(x, delta, out=_slices(y, partition))
        return y
    blocked = x.new_empty(tokens, blocks, delta.shape[2])
    torch.bmm(x, delta, out=blocked.transpose(0, 1))
    return scatter_columns(blocked, partition, y, dropout=dropout)


def _slices(x: Tensor, partition: BlockPartition) -> Tensor:
    """A view of x (T, C) by block, (K, T, P)."""
    return x.view(x.shape[0], partition.num_blocks, partition.col_sizes[0]).transpose(0, 1)


def _delta_blocks(adapter: PackedAdapter) -> Tensor:
    """ΔW by block, (K, P_n, P_c)."""
    return modulated_blocks(adapter, (_width(adapter.partition.T), _width(adapter.partition)))


def _width(partition: BlockPartition) -> int:
    """P, the width of a block of columns in block order; slices are not padded."""
    return partition.col_sizes[0] if partition.is_even else block_width(partition.col_sizes)


def _chosen(stage: str, x: Tensor, adapter: PackedAdapter, operands: Operands) -> str:
    """Choose the algorithm of "auto" without dropout, for one of `spec.ALGORITHM_KEYS`."""
    chosen: str = operands.get(_choose, stage, bucket(x.shape[0]), adapter.partition.is_even)
    return chosen


@table.cached
def _choose(layout: Layout, stage: str, tokens: int, in_place: bool) -> str:
    """Choose by the tuning table for `tokens`, a power of two, else by the rule of `algorithms.py`."""
    name, sizes = layout.precision, (layout.rank, layout.num_blocks, *layout.features, tokens)
    key = Key(stage, name, *sizes, granule=GRANULE if in_place else 1, factors=layout.factors)
    measured = table.measured(key, lambda: ALGORITHMS, layout.device)
    return str(measured or choose_algorithm(tokens, layout.rank, name, architecture(layout.device)))
