"""Backend "eager": forward and backward in torch operators, for CPUs and wherever Triton is absent.

All functions take 2-D activations and a `PackedAdapter`. Since W_effᵀ has the form of W_eff with rows and
columns swapped, `dX = dY W_eff` is the forward's own code on `adapter.T`. Three algorithms:

- merged: build `W_eff = W0 ∘ (1 + s·B̃Ã)` from zero-padded factors, a panel at a time, and multiply by it. In half types
  it is computed in float32 and rounded by thresholds;
- split: the adapter's output block by block, then the base GEMM accumulates onto it and rounds once;
- expanded: for few tokens, `s·Σ_t B̃_t ∘ ((x ∘ Ã_t) W0ᵀ)`: reads W0 and builds nothing of its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..definition.dropout import Dropout
from ..definition.packed import PackedAdapter
from ..definition.precision import accumulate, bmm_in_float32, gemm_is_ieee
from ..definition.thresholds import round_weight
from . import Gradients
from .block_order import block_order, inverse, row_panels, select_columns
from .pages import in_large_pages

ALGORITHMS = ("merged", "split", "expanded")

# The expanded form multiplies slots·T further rows by W0 (one slot per block and rank). Up to this many of them
# it is the cheapest: measured on CPU at 2048² by benchmarks/test_layer.py. In half precision it stays so for longer,
# because W_eff is computed in float32 and rounded.
EXPANDED_MAX_ROWS = {4: 24, 2: 96}  # by bytes of a number

# Rows of W_eff, about, that the merged form builds at a time. Fewer make the GEMM's panels too narrow. More do not stay
# in cache, and a new buffer of W0's size costs page faults: at 4096² a forward takes 11 % more than a frozen one, with
# panels 1 %. A panel that is no multiple of 64 rows (2048 in three equal parts) slows its GEMM by a tenth. At 2048 rows
# two panels of 1024 are 4 % faster than three of 704 in float32, and 1 % slower in bfloat16 (busy Intel Xeon, AMX).
# There a GEMM also copies the panel, which adds to peak memory. A small W_eff is built at once.
MERGED_PANEL = 1024
MERGED_HALF_PANEL = 768
MERGED_BYTES = 2**21
MERGED_ALIGNMENT = 64

# Elements of a half-precision W_eff that a CPU computes in float32 and rounds at a time: temporaries stay in its cache.
ROUNDED_ELEMENTS = 2**17

# Tokens whose columns are gathered at a time: the copies stay in cache, and all panels share one buffer, mapped once.
# At 2048², K = 8, G costs 0.13 of a frozen pass instead of 0.26. In half precision each panel's product is rounded and
# added to a float32 G, which takes a pass over G, so panels are longer.
TOKEN_PANEL = 128
HALF_TOKEN_PANEL = 512


def choose_algorithm(tokens: int, slots: int, dtype: torch.dtype, *, tf32: bool, dropout: bool) -> str:
    """Choose the algorithm of "auto" on this backend; `slots` are K·ρ, at least the adapter's rank.

    In `tf32` the GEMM multiplies float32 in less than IEEE float32, and so would round a small update away. Under
    `dropout` the adapter sees another x than the base layer.
    """
    if dropout:
        return "split"
    if tokens * slots <= EXPANDED_MAX_ROWS[min(dtype.itemsize, 4)]:
        return "expanded"
    return "split" if tf32 else "merged"


def forward(
    x: Tensor, bias: Tensor | None, adapter: PackedAdapter, algorithm: str, dropout: Dropout | None
) -> Tensor:
    """`y = x W0ᵀ + b + dropout(x) ΔWᵀ`: x (T, C) -> y (T, N) in x's dtype, which is W0's."""
    if algorithm == "auto":
        tf32 = x.dtype == torch.float32 and not gemm_is_ieee(x.dtype, x.device.type)
        rows, drops = _expanded_rows(adapter), dropout is not None
        algorithm = choose_algorithm(x.shape[0], rows, x.dtype, tf32=tf32, dropout=drops)
    if algorithm == "merged":
        y = merged(x, adapter)
    elif algorithm == "expanded":
        y = expanded(x, adapter)
    else:
        y = split(x, adapter, dropout)
    # The bias comes last: in a sum with it, before the base GEMM, the adapter's output would be rounded away.
    return y if bias is None else y.add_(bias)


def backward(
    dy: Tensor, x: Tensor | None, adapter: PackedAdapter, dropout: Dropout | None, *, needs_x: bool
) -> Gradients:
    """Gradients (dX, dA, dB) of :func:`forward`: dX where `needs_x`, dA and dB where x is given."""
    mask = None if dropout is None else dropout.multiplier(dy.new_empty(dy.shape[0], adapter.weight.shape[1]))
    # dA and dB come first, so that their memory is free when dX is computed.
    dA = dB = None
    if x is not None and mask is not None:
        x = x * mask if needs_x else mask.mul_(x)
    if x is not None:
        dA, dB = factor_gradients(dy, x, adapter)
    return input_gradient(dy, adapter, mask) if needs_x else None, dA, dB


def input_gradient(dy: Tensor, adapter: PackedAdapter, mask: Tensor | None) -> Tensor:
    """`dX = dY W_eff` (T, C), or under dropout's `mask` (T, C) `dY W0 + mask ∘ (dY ΔW)`."""
    if mask is not None:
        return adapter_output(dy, adapter.T).mul_(mask).addmm_(dy, adapter.weight)
    # Merged in TF32 too: in dX its rounding is a second-order error.
    rows = _expanded_rows(adapter)
    if choose_algorithm(dy.shape[0], rows, dy.dtype, tf32=False, dropout=False) == "expanded":
        return expanded(dy, adapter.T)
    return merged(dy, adapter.T)


def _expanded_rows(adapter: PackedAdapter) -> int:
    """K·ρ: how many rows the expanded factors have at most."""
    return adapter.A.shape[0] * adapter.partition.num_blocks


def modulated_weight(adapter: PackedAdapter) -> Tensor:
    """`W_eff = W0 ∘ (1 + s·B̃Ã)`, (N, C) in W0's dtype and memory order.

    Half types are rounded by thresholds (`definition/thresholds.py`).
    """
    return _modulation(adapter)(0, torch.empty_like(adapter.weight))


def _modulation(adapter: PackedAdapter) -> Callable[[int, Tensor], Tensor]:
    """Return a function (first row, out) that writes rows of W_eff to `out`, in W0's memory order, and returns it."""
    weight, modulate = adapter.weight, _modulate_rows(adapter)
    if weight.dtype == torch.promote_types(weight.dtype, torch.float32):
        return lambda first, out: modulate(first, weight[first : first + out.shape[0]], out)
    rows = weight.shape[0]
    if weight.device.type == "cpu":
        rows = max(16, ROUNDED_ELEMENTS // max(1, weight.shape[1]))

    def write(first: int, out: Tensor) -> Tensor:
        for part in row_panels(out, max(1, rows)):
            wide = weight[first : first + part.shape[0]].float()
            W_eff = modulate(first, wide, torch.empty_like(wide))
            part.copy_(round_weight(W_eff, weight.dtype, adapter.place.part(first, 0)))
            first += part.shape[0]
        return out

    return write


def _modulate_rows(adapter: PackedAdapter) -> Callable[[int, Tensor, Tensor], Tensor]:
    """Return a function (first row, rows of W0, out) that writes these rows of W_eff to `out`, at least in float32."""
    if not adapter.partition.is_contiguous:
        A, B = adapter.expanded_factors(torch.promote_types(adapter.weight.dtype, torch.float32))
        return lambda first, W0, out: _modulated(W0, A, B[first : first + out.shape[0]], out)
    order = block_order(adapter)
    blocks = list(zip(order.places(), order.factors(order.A, order.B), strict=True))

    def write_blocks(first: int, W0: Tensor, out: Tensor) -> Tensor:
        """Only the blocks differ from W0."""
        last = first + out.shape[0]
        out.copy_(W0)
        for (rows, cols), (A, B) in blocks:
            start, stop = max(first, rows.start), min(last, rows.stop)
            if start < stop:
                place = slice(start - first, stop - first), cols
                _modulated(W0[place], A, B[start - rows.start : stop - rows.start], out[place])
        return out

    return write_blocks


def _modulated(weight: Tensor, A: Tensor, B: Tensor, out: Tensor) -> Tensor:
    """`out = weight ∘ (1 + B A)` for one block; all have one memory order."""
    if weight.stride(0) < weight.stride(1):  # column-major: compute the transpose, along memory
        return _modulated(weight.T, B.T, A.T, out.T).T
    torch.mm(B, A, out=out)
    return torch.addcmul(weight, weight, out, out=out)


def merged(x: Tensor, adapter: PackedAdapter) -> Tensor:
    """`x W_effᵀ` (T, N), on a CPU a panel of W_eff's rows at a time: its GEMM finds the panel in cache."""
    weight, modulation = adapter.weight, _modulation(adapter)
    most = MERGED_PANEL if weight.itemsize > 2 else MERGED_HALF_PANEL
    most = max(most, MERGED_BYTES // max(1, weight.shape[1] * weight.itemsize))
    count = math.ceil(weight.shape[0] / most)
    y = in_large_pages(x.new_empty(x.shape[0], weight.shape[0]))
    if count <= 1 or weight.device.type != "cpu":
        return torch.mm(x, modulation(0, torch.empty_like(weight)).T, out=y)
    height = MERGED_ALIGNMENT * math.ceil(weight.shape[0] / (MERGED_ALIGNMENT * count))
    buffer = in_large_pages(torch.empty_like(weight[:height]))
    for first, out in enumerate(y.split(height, dim=1)):
        torch.mm(x, modulation(first * height, buffer[: out.shape[1]]).T, out=out)
    return y


def split(x: Tensor, adapter: PackedAdapter, dropout: Dropout | None) -> Tensor:
    """`x W0ᵀ + dropout(x) ΔWᵀ` (T, N): computes the adapter's output; the base GEMM adds to it and rounds once."""
    return accumulate(adapter_output(x, adapter, dropout), x, adapter.weight)


def adapter_output(x: Tensor, adapter: PackedAdapter, dropout: Dropout | None = None) -> Tensor:
    """`y[:, rows_k] = dropout(x)[:, cols_k] ΔW_kᵀ` for every block: the adapter's output alone, (T, N)."""
    order, deltas = block_order(adapter), []
    for (A, B), weight in zip(order.factors(order.A, order.B), order.weights(), strict=True):
        product = (A.T @ B.T).T if weight.stride(0) < weight.stride(1) else B @ A  # along W0's memory
        deltas.append(product.mul_(weight).to(weight.dtype).T)

    def multiply(x: Tensor, y: Tensor) -> Tensor:
        """Write the output to y; columns of both are in block order."""
        if not all(order.ranks):
            y.zero_()  # for blocks of rank zero
        for x_k, delta, y_k in zip(order.cols(x), deltas, order.rows(y, 1), strict=True):
            torch.mm(x_k, delta, out=y_k)
        return y

    p, x = adapter.partition, x if dropout is None else dropout.multiplier(x).mul_(x)
    y = in_large_pages(x.new_empty(x.shape[0], adapter.weight.shape[0]))
    if p.is_contiguous:
        return multiply(x, y)
    back, gathered, scratch = inverse(p.row_index), _Buffer(), _Buffer()
    for x_part, y_part in _panels(x, y):
        ordered = multiply(gathered.columns(x_part, p.col_index), scratch.like(y_part))
        select_columns(ordered, back, out=y_part)
    return y


def factor_gradients(dy: Tensor, x: Tensor, adapter: PackedAdapter) -> tuple[Tensor, Tensor]:
    """(dA, dB): `H_k = s·(dY_kᵀ X_k) ∘ W0_k`, `dA_k = B_kᵀ H_k`, `dB_k = H_k A_kᵀ`.

    Padding rows get zeros.
    """
    p, gradient, left, right = adapter.partition, BlockGradient(adapter), _Buffer(), _Buffer()
    # A CPU rounds a product of half types to the half type, which overflows if it sums over too many tokens.
    whole = p.is_contiguous and not (x.itemsize == 2 and x.device.type == "cpu")
    for dy_part, x_part in [(dy, x)] if whole else _panels(dy, x):
        if not p.is_contiguous:
            dy_part, x_part = left.columns(dy_part, p.row_index), right.columns(x_part, p.col_index)
        gradient.add(dy_part, x_part)
    del left, right
    return gradient.contract()


def _panels(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut all tensors into panels of the same tokens."""
    tokens = TOKEN_PANEL if tensors[0].itemsize > 2 else HALF_TOKEN_PANEL
    return zip(*(row_panels(tensor, tokens) for tensor in tensors), strict=True)


class _Buffer:
    """Memory that all panels share; the first panel is the largest."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def like(self, panel: Tensor) -> Tensor:
        """A contiguous tensor of a panel's shape and dtype."""
        if self._memory is None:
            self._memory = panel.new_empty(panel.shape)
        return self._memory[: panel.shape[0]]

    def columns(self, panel: Tensor, index: Tensor) -> Tensor:
        """The columns of a panel in the order of `index`."""
        return select_columns(panel, index, out=self.like(panel))


def _mm_in_float32(left: Tensor, right: Tensor) -> Tensor:
    """The product of two matrices in at least float32, which a CPU would take long for."""
    return bmm_in_float32(left[None], right[None])[0]


class BlockGradient:
    """`G_k = dY_kᵀ X_k`, summed over panels of tokens, or blocks of G (N, C); contracted with W0 and the factors."""

    def __init__(self, adapter: PackedAdapter, G: Tensor | None = None) -> None:
        self._adapter = adapter
        # W0 is read along its memory: if it is column-major everything is computed transposed.
        self._transposed = adapter.weight.stride(0) < adapter.weight.stride(1)
        self._order = block_order(adapter.T if self._transposed else adapter)
        self._G: list[Tensor] = []
        if G is not None:
            taken = replace(self._order, weight=G.T if self._transposed else G)
            self._G += (block.to(taken.A.dtype, copy=True) for block in taken.weights())

    def add(self, dy: Tensor, x: Tensor) -> None:
        """Add a panel of tokens; the columns of dY and of x are in block order."""
        order = self._order
        left, right = (x.T, dy) if self._transposed else (dy.T, x)
        pairs = zip(order.rows(left), order.cols(right), strict=True)
        multiply = torch.mm if right.device.type == "cpu" else _mm_in_float32
        if not self._G:
            self._G = [multiply(left_k, right_k) for left_k, right_k in pairs]
        elif right.dtype == order.A.dtype:
            for G, (left_k, right_k) in zip(self._G, pairs, strict=True):
                G.addmm_(left_k, right_k)
        else:  # half precision: the sums are float32
            for k, (left_k, right_k) in enumerate(pairs):
                self._G[k] = self._G[k].to(order.A.dtype).add_(multiply(left_k, right_k))

    def contract(self) -> tuple[Tensor, Tensor]:
        """(dA, dB); consumes the sums."""
        order = self._order
        new = order.A.new_empty if order.full else order.A.new_zeros
        # dB is computed as its transpose, in half the time: a GEMM with few columns is slower than one with few rows.
        dA, dB = new(order.A.shape), new(order.B.T.shape).T
        factors, gradients = order.factors(order.A, order.B), order.factors(dA, dB)
        for (A, B), (dA_k, dB_k), weight in zip(factors, gradients, order.weights(), strict=True):
            # At least float32 from here on: H is contracted once more, over the width of the block.
            H = self._G.pop(0).to(dA.dtype).mul_(weight)
            torch.mm(B.T, H, out=dA_k)
            torch.mm(A, H.T, out=dB_k.T)
        dB.mul_(self._adapter.scaling)  # for dA, order.B holds s
        if not order.partition.is_contiguous:
            dA = dA.index_select(1, inverse(order.partition.col_index))
            dB = dB.index_select(0, inverse(order.partition.row_index))
        dA, dB = (dB.T, dA.T) if self._transposed else (dA, dB)
        return dA.to(self._adapter.A.dtype).contiguous(), dB.to(self._adapter.B.dtype).contiguous()


def expanded(x: Tensor, adapter: PackedAdapter) -> Tensor:
    """`x W0ᵀ + Σ_t B̃_t ∘ ((x ∘ Ã_t) W0ᵀ)`, (T, N), without a temporary of W0's size."""
    y = in_large_pages(x.new_empty(x.shape[0], adapter.weight.shape[0]))
    parts: Iterable[tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]]
    if adapter.partition.is_contiguous:  # the factors of a block are multiplied with that block of W0 only
        order = block_order(adapter)
        if not all(order.ranks):
            y.zero_()
        factors = order.factors(order.A, order.B)
        parts = zip(order.cols(x), factors, order.weights(), order.rows(y, 1), strict=True)
    else:
        factors_of_all = adapter.expanded_factors(torch.promote_types(x.dtype, torch.float32))
        parts = [(x, factors_of_all, adapter.weight, y)]
    for x_k, (A, B), weight, y_k in parts:
        products = (x_k * A[:, None].to(x.dtype)).flatten(0, 1) @ weight.T
        products = products.view(len(A), len(x), len(B)).to(B.dtype)  # at least float32
        y_k.copy_((products * B.T[:, None]).sum(0))
    return accumulate(y, x, adapter.weight)
