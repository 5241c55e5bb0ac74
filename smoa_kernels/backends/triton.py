"""Backend "triton": forward and backward composed of the kernels and of cuBLAS's plain GEMMs.

- merged: `modulate` builds W_eff, one GEMM;
- split: `permute` gathers x by block (`block_matmul` reads it where it lies if blocks consist of granules),
  `block_matmul` writes the adapter's output, and the base GEMM accumulates onto it and rounds once;
- fused: for few tokens, base and adapter in one pass over W0; nothing is built. A sum of a single term (C = 1;
  for dX N = 1) is not fused: Triton 3.6 then removes the loop and clears the sum after wgmma.fence, which Hopper does
  not allow (emulated). Triton 3.9 does not.

Where the kernels gain little, the eager backend computes any part of a pass (`algorithms.choose_algorithm`).

Backward: `block_grad` computes dA and dB. Its gathered copies of dY and x are freed before dX needs its workspace.
dX is merged in every dtype (a rounded W_eff is a second-order error there), split under dropout, fused for few tokens.

Experts: one launch computes all of them. Nothing of W0's size is built, and the host does not wait for `ends`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..definition.dropout import Dropout
from ..definition.experts import ExpertsAdapter
from ..definition.packed import PackedAdapter
from ..definition.partition import BlockPartition
from ..definition.precision import accumulate
from ..kernels import modulate, table
from ..kernels.architectures import architecture
from ..kernels.block_grad import block_grad
from ..kernels.block_matmul import block_matmul
from ..kernels.fused_linear import fused_linear
from ..kernels.grouped_grad import grouped_grad
from ..kernels.grouped_linear import grouped_linear
from ..kernels.launch import Layout, described, on_device
from ..kernels.modulate import modulated_blocks
from ..kernels.permute import gather_columns, scatter_columns
from ..kernels.spec import Key, block_width, bucket, granule_of
from . import Gradients, eager
from .algorithms import admissible, choose_algorithm
from .block_order import is_batch

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
    if algorithm == "auto":
        algorithm = "split" if dropout is not None else _chosen("forward", x, adapter)
    if algorithm == "eager":
        return eager.forward(x, bias, adapter, "auto", None)
    if algorithm == "merged":
        return F.linear(x, modulate.modulated_weight(adapter), bias)
    if algorithm == "fused" and adapter.weight.shape[1] > 1:
        return fused_linear(x, bias, adapter)
    xg = _by_block(x, adapter.partition, dropout)
    y = x.new_empty(x.shape[0], adapter.weight.shape[0])
    block_matmul(xg, adapter, _delta_blocks(adapter), out=y)
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
        # dA and dB come first, so that their gathered copies are freed before dX takes its workspace.
        if x is not None:
            dA, dB = factor_gradients(dy, x, adapter, dropout)
        if needs_x:
            dx = input_gradient(dy, adapter, dropout)
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


def modulated_weight(adapter: PackedAdapter, *, out: Tensor | None = None) -> Tensor:
    """`W_eff`, (N, C) in W0's dtype; written to `out` where that is given."""
    with on_device(adapter.weight.device):
        return modulate.modulated_weight(adapter, out=out, ieee=True)


def factor_gradients(
    dy: Tensor, x: Tensor, adapter: PackedAdapter, dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    """(dA, dB) by the kernels or by torch's operators. On the current device."""
    if dropout is None and _chosen("factor_gradients", dy, adapter) == "eager":
        return eager.factor_gradients(dy, x, adapter)
    dyg = _by_block(dy, adapter.partition.T)
    return block_grad(dyg, _by_block(x, adapter.partition, dropout), adapter)


def input_gradient(dy: Tensor, adapter: PackedAdapter, dropout: Dropout | None) -> Tensor:
    """`dX = dY W0 + dropoutᵀ(dY ΔW)`: dY (T, N) -> dX (T, C), split under dropout. On the current device."""
    if dropout is None:
        algorithm = _chosen("input_gradient", dy, adapter)
        if algorithm == "eager":
            return eager.input_gradient(dy, adapter)
        if algorithm == "fused" and adapter.weight.shape[0] > 1:
            return fused_linear(dy, None, adapter.T)
        return dy @ modulate.modulated_weight(adapter)
    dyg = _by_block(dy, adapter.partition.T)
    delta = _delta_blocks(adapter)
    dxg = dy.new_empty(dy.shape[0], delta.shape[0], delta.shape[2])
    block_matmul(dyg, adapter.T, delta.mT, out=dxg)
    dx = dy.new_empty(dy.shape[0], adapter.weight.shape[1])
    scatter_columns(dxg, adapter.partition, dx, dropout=dropout)
    return dx.addmm_(dy, adapter.weight)


def _by_block(x: Tensor, partition: BlockPartition, dropout: Dropout | None = None) -> Tensor:
    """x's columns grouped by block, (T, K, P); x itself if it has granules, which kernels read in place."""
    if dropout is None and granule_of(partition.granularity, partition.shape) > 1:
        return x
    return gather_columns(x, partition, block_width(partition.col_sizes), dropout=dropout)


def _delta_blocks(adapter: PackedAdapter) -> Tensor:
    """ΔW by block, (K, P_n, P_c)."""
    p = adapter.partition
    widths = block_width(p.row_sizes), block_width(p.col_sizes)
    return modulated_blocks(adapter, widths)


def _chosen(stage: str, x: Tensor, adapter: PackedAdapter) -> str:
    """Choose the algorithm of "auto" without dropout, for one of `spec.ALGORITHM_KEYS`."""
    layout, _ = described(adapter)
    batch = layout.num_blocks if is_batch(adapter) else 0
    return _choose(stage, layout, bucket(x.shape[0]), batch)


@table.remembered
def _choose(stage: str, layout: Layout, tokens: int, batch: int) -> str:
    """Choose by the tuning table for `tokens`, a power of two, else by the rule of `algorithms.py`."""
    name, sizes = layout.precision, (layout.rank, layout.num_blocks, *layout.features, tokens)
    key = Key(stage, name, *sizes, granule=layout.granule, factors=layout.factors)
    measured = table.fastest(key, layout.device, admissible(stage, name))
    if isinstance(measured, str):
        return measured
    return choose_algorithm(stage, tokens, layout.rank, name, architecture(layout.device), batch)
