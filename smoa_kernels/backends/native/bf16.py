"""bfloat16 by AMX or AVX512-BF16: one compiled call for y, one for dA and dB, one for dX (`bf16_linear.h` and others).

With AMX a frozen layer takes so little time that copies, torch's calls and Python between GEMMs would count for more
than the GEMMs; of small layers they count without it too. What computes float16, and bfloat16 where there is neither,
`backend.py` says. Both need AVX512-VBMI2, which moves halves.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...definition.packed import PackedAdapter
from ..pages import in_large_pages, workspace
from .layer import Layer
from .library import library, obstacle
from .operands import Mask, kept_by, named, with_rows

__all__ = ["COMPILED_BF16", "backward", "has_amx", "is_faster", "is_there", "multiplies", "split"]

COMPILED_BF16 = "smoa::compiled_bf16"
"""What these compiled functions are called in a profile."""

MOST_EXPANDED = 4
"""From 5 tokens on split is faster: 2.19 and 1.80 of a frozen 2048² layer for 2.25 and 2.03 (spectral and contiguous
blocks, r=8), of 8 tokens 2.03 and 1.66 for 2.76 and 2.38 (AMD EPYC, family 26, one thread)."""


def multiplies(tokens: Tensor, adapter: PackedAdapter) -> bool:
    """Whether this code takes x, or dY, of an adapter: it reads W0's rows where they lie."""
    weight = adapter.weight
    return (
        tokens.dtype == torch.bfloat16
        and tokens.shape[0] > 0
        and weight.numel() > 0
        and weight.stride(1) == 1
        and weight.stride(0) >= weight.shape[1]
        and is_there()
    )


def is_faster(x: Tensor, adapter: PackedAdapter) -> bool:
    """Whether :func:`split` takes less time than the form for few tokens, of as few; with AMX it was not found to."""
    return x.shape[0] > MOST_EXPANDED and multiplies(x, adapter) and not has_amx()


@functools.cache
def is_there() -> bool:
    """Whether this process may use this code: processor, compiler, and what torch's GEMMs are held to, allow it."""
    return obstacle() is None and bool(library().smoa_bf16_fit())


@functools.cache
def has_amx() -> bool:
    """Whether it may use AMX, which the system must allow too."""
    return obstacle() is None and bool(library().smoa_amx_fit())


def split(x: Tensor, bias: Tensor | None, adapter: PackedAdapter, mask: Mask | None) -> Tensor:
    """`x W0ᵀ + b + dropout(x) ΔWᵀ` (T, N), rounded once; b in x's dtype."""
    code, threads, x, layer = library(), torch.get_num_threads(), with_rows(x), _layer(adapter, mask)
    bias = None if bias is None else bias.contiguous()
    y = in_large_pages(x.new_empty(x.shape[0], layer.rows))
    room = workspace(x, code.smoa_bf16_forward_workspace(layer, x.shape[0], mask is not None, threads))
    with named(COMPILED_BF16):
        code.smoa_bf16_forward(
            layer, x.shape[0], x.data_ptr(), x.stride(0), kept_by(mask), None if bias is None else bias.data_ptr(),
            y.data_ptr(), room.data_ptr(), threads,
        )  # fmt: skip
    return y


def backward(
    dy: Tensor, x: Tensor | None, adapter: PackedAdapter, mask: Mask | None, *, needs_x: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dX, dA, dB), those that are asked for: `dX = dY W_eff`, or under dropout `dY W0 + dropoutᵀ(dY ΔW)`."""
    code, threads, dy, layer = library(), torch.get_num_threads(), with_rows(dy), _layer(adapter, mask)
    tokens, dx, dA, dB = dy.shape[0], None, None, None
    if x is not None:
        x, dA, dB = with_rows(x), adapter.A.new_empty(adapter.A.shape), adapter.B.new_empty(adapter.B.shape)
        room = workspace(dy, code.smoa_bf16_gradient_workspace(layer, tokens, threads))
        with named(COMPILED_BF16):
            code.smoa_bf16_gradient(
                layer, tokens, dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0), kept_by(mask), dA.data_ptr(),
                dB.data_ptr(), room.data_ptr(), threads,
            )  # fmt: skip

    if needs_x:
        dx = in_large_pages(dy.new_empty(tokens, layer.cols))
        room = workspace(dy, code.smoa_bf16_input_workspace(layer, tokens, mask is not None, threads))
        with named(COMPILED_BF16):
            code.smoa_bf16_input(
                layer, tokens, dy.data_ptr(), dy.stride(0), kept_by(mask), dx.data_ptr(), room.data_ptr(), threads,
            )  # fmt: skip
    return dx, dA, dB


def _layer(adapter: PackedAdapter, mask: Mask | None) -> Layer:
    scale = 1.0 if mask is None else mask.scale
    A, B = adapter.A.contiguous(), adapter.B.contiguous()
    return Layer(adapter.weight).adapt(adapter, A, B, scale).index(adapter)
