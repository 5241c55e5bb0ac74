"""Backend "eager": forward and backward in torch operators, for CPUs and wherever Triton is absent.

All functions take 2-D activations and a `PackedAdapter`. Since W_effᵀ has the form of W_eff with rows and
columns swapped, `dX = dY W_eff` is the forward's own code on `adapter.T`. Three algorithms:

- merged: build `W_eff = W0 ∘ (1 + s·B̃Ã)` from zero-padded factors, a panel at a time, and multiply by it;
- split: the adapter's output block by block, then the base GEMM accumulates onto it and rounds once;
- expanded: for few tokens, `s·Σ_t B̃_t ∘ ((x ∘ Ã_t) W0ᵀ)`: reads W0 and builds nothing of its size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dropout import Dropout
from .packed import PackedAdapter, gather_columns, scatter_columns
from .precision import gemm_is_ieee

__all__ = ["ALGORITHMS", "backward", "choose_algorithm", "delta_weight", "forward", "modulated_weight"]

ALGORITHMS = ("merged", "split", "expanded")

# The expanded form multiplies slots·T further rows by W0 (one slot per block and rank). Up to this many of them
# it is the cheapest: measured on CPU at 2048² by benchmarks/test_few_tokens.py. Half precision stays longer
# because its alternative, split, also reads W0 twice.
EXPANDED_MAX_ROWS = {True: 24, False: 96}

# Rows of W_eff that the merged form builds at a time. Fewer make the GEMM's panels too narrow; more do not stay in
# cache, and a fresh buffer of W0's size costs its page faults: at 4096², 5 % over a frozen forward instead of 23 %.
MERGED_PANEL = 1024


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
        y = _merged(x, adapter)
    elif algorithm == "expanded":
        y = _expanded(x, adapter)
    else:
        y = _block_matmul(x if dropout is None else dropout.multiplier(x).mul_(x), adapter)
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
    dA = dB = dx = None
    if dropout is not None:
        multiplier = dropout.multiplier(dy, adapter.weight.shape[1])
        if needs_x:
            dx = _block_matmul(dy, adapter.T).mul_(multiplier).addmm_(dy, adapter.weight)
        if x is not None:
            dA, dB = _block_grad(dy, multiplier.mul_(x), adapter)
        return dx, dA, dB
    if x is not None:
        dA, dB = _block_grad(dy, x, adapter)
    if needs_x:
        if choose_algorithm(dy.shape[0], _slots(adapter), ieee=True, dropout=False) == "expanded":
            dx = _expanded(dy, adapter.T)
        else:  # merged in every dtype: in dX a rounded W_eff is a second-order error
            dx = _merged(dy, adapter.T)
    return dx, dA, dB


def _slots(adapter: PackedAdapter) -> int:
    """K·ρ: how many rows the expanded factors have at most."""
    return adapter.A.shape[0] * adapter.partition.num_blocks


def modulated_weight(adapter: PackedAdapter) -> Tensor:
    """`W_eff = W0 ∘ (1 + s·B̃Ã)`, (N, C) in W0's dtype and memory order."""
    A, B = adapter.expanded_factors(adapter.weight.dtype)
    return _modulated(adapter.weight, A, B, torch.empty_like(adapter.weight))


def _modulated(weight: Tensor, A: Tensor, B: Tensor, out: Tensor) -> Tensor:
    """`out = weight ∘ (1 + B A)`, all in one memory order."""
    if weight.stride(0) < weight.stride(1):  # column-major: walk it along its memory
        return _modulated(weight.T, B.T, A.T, out.T).T
    torch.mm(B, A, out=out)
    return torch.addcmul(weight, weight, out, out=out)


def _merged(x: Tensor, adapter: PackedAdapter) -> Tensor:
    """`x W_effᵀ` (T, N), a panel of W_eff's rows at a time: its product meets it in cache, and it is never whole."""
    weight = adapter.weight
    A, B = adapter.expanded_factors(weight.dtype)
    panel = torch.empty_like(weight[:MERGED_PANEL])
    y = x.new_empty(x.shape[0], weight.shape[0])
    for rows in range(0, weight.shape[0], MERGED_PANEL):
        part = slice(rows, rows + MERGED_PANEL)
        W_eff = _modulated(weight[part], A, B[part], panel[: weight[part].shape[0]])
        torch.mm(x, W_eff.T, out=y[:, part])
    return y


def _product(A: Tensor, B: Tensor, like: Tensor) -> Tensor:
    """`B A` in the memory order of a weight, with which it is then multiplied."""
    return (A.T @ B.T).T if like.stride(0) < like.stride(1) else B @ A


def delta_weight(adapter: PackedAdapter) -> Tensor:
    """`ΔW`, (N, C) in W0's dtype, zero outside the diagonal blocks; rounded once."""
    A, B = adapter.expanded_factors(torch.promote_types(adapter.weight.dtype, torch.float32))
    return (B @ A).mul_(adapter.weight).to(adapter.weight.dtype)


def _block_matmul(x: Tensor, adapter: PackedAdapter) -> Tensor:
    """`y[:, rows_k] = x[:, cols_k] ΔW_kᵀ` for every block: the adapter's output alone, (T, N)."""
    y = x.new_empty(x.shape[0], adapter.weight.shape[0])
    for block in adapter.blocks():
        if block.rank:
            weight = block.weight(adapter)
            delta = _product(block.A, block.B.mul(adapter.scaling), weight).mul_(weight)
            output = _columns(x, block.cols) @ delta.to(x.dtype).T
        else:
            output = x.new_zeros(x.shape[0], block.B.shape[0])  # accumulated onto where K = 1
        if block.rows is None:
            return output
        scatter_columns(y, block.rows, output)
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
    """The columns of one block; all of them where K = 1."""
    return x if index is None else gather_columns(x, index)
