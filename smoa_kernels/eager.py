"""Backend "eager": forward and backward in torch operators, for CPUs and wherever Triton is absent.

All functions take 2-D activations and a `PackedAdapter`. Since W_effᵀ has the form of W_eff with rows and
columns swapped, `dX = dY W_eff` is the forward's own code on `adapter.T`. Three algorithms:

- merged: build `W_eff = W0 ∘ (1 + s·B̃Ã)` from zero-padded factors, then one GEMM;
- split: the adapter's output block by block, then the base GEMM accumulates onto it and rounds once;
- expanded: for few tokens, `s·Σ_t B̃_t ∘ ((x ∘ Ã_t) W0ᵀ)`: reads W0 and builds nothing of its size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import Dropout
from .packed import PackedAdapter
from .precision import gemm_is_ieee

__all__ = ["ALGORITHMS", "backward", "choose_algorithm", "delta_weight", "forward", "modulated_weight"]

ALGORITHMS = ("merged", "split", "expanded")

# The expanded form multiplies slots·T further rows by W0 (one slot per block and rank). Up to this many of them
# it is the cheapest: measured on CPU at 2048² by benchmarks/test_few_tokens.py. Half precision stays longer
# because its alternative, split, also reads W0 twice.
EXPANDED_MAX_ROWS = {True: 24, False: 96}


def choose_algorithm(tokens: int, slots: int, *, ieee: bool, dropout: bool) -> str:
    """What "auto" means on this backend.

    Args:
        tokens: T.
        slots: K·ρ, at least the adapter's rank.
        ieee: whether the GEMM multiplies in IEEE float32 or float64.
        dropout: whether the adapter sees another x than the base layer.
    """
    if dropout:
        return "split"
    if tokens * slots <= EXPANDED_MAX_ROWS[ieee]:
        return "expanded"
    # A W_eff rounded to half precision loses an update smaller than W0's last bit.
    return "merged" if ieee else "split"


def forward(
    x: Tensor, bias: Tensor | None, adapter: PackedAdapter, algorithm: str, dropout: Dropout | None
) -> Tensor:
    """`y = x W0ᵀ + b + dropout(x) ΔWᵀ`: x (T, C) -> y (T, N) in x's dtype, which is W0's."""
    if algorithm == "auto":
        ieee = gemm_is_ieee(x.dtype, x.device.type)
        algorithm = choose_algorithm(x.shape[0], _slots(adapter), ieee=ieee, dropout=dropout is not None)
    if algorithm == "merged":
        return F.linear(x, modulated_weight(adapter), bias)
    if algorithm == "expanded":
        y = _expanded(x, adapter)
    else:
        y = _block_matmul(x if dropout is None else x * dropout.multiplier(x), adapter)
        y.addmm_(x, adapter.weight.T)
    # Last: added before the base GEMM a bias would round the adapter's output away.
    return y if bias is None else y.add_(bias)


def backward(
    dy: Tensor,
    x: Tensor | None,
    adapter: PackedAdapter,
    dropout: Dropout | None,
    *,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (dX, dA, dB) of :func:`forward`: dX where `needs_x`, dA and dB where x is given."""
    multiplier = None if dropout is None else dropout.multiplier(dy, adapter.weight.shape[1])
    dA = dB = dx = None
    # The factors first: their gathered copies are gone before W_eff is built.
    if x is not None:
        dA, dB = _block_grad(dy, x if multiplier is None else x * multiplier, adapter)
    if needs_x:
        if multiplier is not None:
            dx = _block_matmul(dy, adapter.T).mul_(multiplier).addmm_(dy, adapter.weight)
        elif choose_algorithm(dy.shape[0], _slots(adapter), ieee=True, dropout=False) == "expanded":
            dx = _expanded(dy, adapter.T)
        else:  # merged in every dtype: in dX a rounded W_eff is a second-order error
            dx = dy @ modulated_weight(adapter)
    return dx, dA, dB


def _slots(adapter: PackedAdapter) -> int:
    """K·ρ: how many rows the expanded factors have at most."""
    return adapter.A.shape[0] * adapter.partition.num_blocks


def modulated_weight(adapter: PackedAdapter) -> Tensor:
    """`W_eff = W0 ∘ (1 + s·B̃Ã)`, (N, C) in W0's dtype and memory order."""
    weight = adapter.weight
    if weight.stride(0) < weight.stride(1):  # column-major: walk it along its memory
        return modulated_weight(adapter.T).T
    A, B = adapter.expanded_factors(weight.dtype)
    product = B @ A
    return torch.addcmul(weight, weight, product, out=product)


def delta_weight(adapter: PackedAdapter) -> Tensor:
    """`ΔW`, (N, C) in W0's dtype, zero outside the diagonal blocks; rounded once."""
    A, B = adapter.expanded_factors(torch.promote_types(adapter.weight.dtype, torch.float32))
    return (B @ A).mul_(adapter.weight).to(adapter.weight.dtype)


def _block_matmul(x: Tensor, adapter: PackedAdapter) -> Tensor:
    """`y[:, rows_k] = x[:, cols_k] ΔW_kᵀ` for every block: the adapter's output alone, (T, N)."""
    y = x.new_empty(x.shape[0], adapter.weight.shape[0])
    for block in adapter.blocks():
        if block.rank:
            delta = (block.B.mul(adapter.scaling) @ block.A).mul_(block.weight(adapter))
            output = _columns(x, block.cols) @ delta.to(x.dtype).T
        else:
            output = x.new_zeros(()).expand(x.shape[0], block.B.shape[0])
        if block.rows is None:
            return output
        y.scatter_(1, block.rows.expand(x.shape[0], -1), output)
    return y


def _block_grad(dy: Tensor, x: Tensor, adapter: PackedAdapter) -> tuple[Tensor, Tensor]:
    """`H_k = s·(dY_kᵀ X_k) ∘ W0_k`, `dA_k = B_kᵀ H_k`, `dB_k = H_k A_kᵀ`; padding rows get zeros."""
    if adapter.weight.stride(0) < adapter.weight.stride(1):
        dB, dA = _block_grad(x, dy, adapter.T)
        return dA.T, dB.T
    dA, dB = torch.zeros_like(adapter.A), torch.zeros_like(adapter.B)
    for block in adapter.blocks():
        if block.rank:
            G = _columns(dy, block.rows).T @ _columns(x, block.cols)
            # Wider than half precision from here: H is contracted again, over the width of the block.
            H = G.to(block.A.dtype).mul_(block.weight(adapter))
            block.put(dA, block.B.mul(adapter.scaling).T @ H, dB, H @ block.A.mul(adapter.scaling).T)
    return dA, dB


def _expanded(x: Tensor, adapter: PackedAdapter) -> Tensor:
    """`x W0ᵀ + Σ_t B̃_t ∘ ((x ∘ Ã_t) W0ᵀ)`, (T, N), without a temporary of W0's size."""
    wide = torch.promote_types(x.dtype, torch.float32)
    A, B = adapter.expanded_factors(wide)
    products = (x * A[:, None].to(x.dtype)).flatten(0, 1) @ adapter.weight.T
    update = (products.view(A.shape[0], x.shape[0], B.shape[0]).to(wide) * B.T[:, None]).sum(0)
    return update.to(x.dtype).addmm_(x, adapter.weight.T)


def _columns(x: Tensor, index: Tensor | None) -> Tensor:
    """The columns of one block; `gather` is the fastest of torch's ways to copy columns, in every dtype."""
    return x if index is None else x.gather(1, index.expand(x.shape[0], -1))
