"""Backend "native": the eager backend's algorithms on a CPU, compiled from `calls.c`.

A GEMM copies its operands into panels anyway. While it copies, this one modulates W0, so there is no W_eff in memory
(`gemm.h`). x and dY are copied in block order, some tokens at a time, where an order or a mask asks for it. `ROUTES`
decides which code computes a call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...definition.dropout import Dropout
from ...definition.packed import PackedAdapter
from .. import Gradients, eager
from ..pages import in_large_pages
from .library import KINDS, Algorithm, Call, Mask, Path, drawn, has, lies_along_memory, unsupported_reason

ALGORITHMS, modulated_weight = eager.ALGORITHMS, eager.modulated_weight


@dataclass(frozen=True)
class Route:
    """A row of `ROUTES`: which calls it takes, and by which path.

    A call with dropout counts as the algorithm "dropout", whatever was asked for.
    """

    path: Path
    dtypes: tuple[torch.dtype, ...] = tuple(KINDS)  # of x or dY
    algorithms: tuple[str, ...] = ("auto", "merged", "split", "expanded", "dropout")
    needs: str = ""  # what the machine must have, a name for `library.has`, or ""
    most: tuple[int, int] | None = None  # the largest T and T·ρ that it takes, for `FEW`; None: it takes all


ROUTES = (
    Route(Path.FEW, algorithms=("expanded",)),
    Route(Path.FEW, algorithms=("auto", "merged", "split"), most=(12, 64)),
    Route(Path.TILES, (torch.bfloat16,), needs="bf16"),
    Route(Path.FEW, algorithms=("auto", "merged", "split"), needs="avx512", most=(16, 64)),
    Route(Path.FLOAT),
)
"""The first row that takes a call computes it.

FEW makes W_eff in float32 in registers, so that no update is lost: "merged" and "split" are one there. One bfloat16
token of one block is multiplied by W0 and by A_t ∘ x instead, which is rounded. It reads A once for every few rows of
W0, and W0 once for every eight tokens. Beyond the limits these repeated reads cost more than packing W0, which costs
least for tiles. The limits were measured at 576² and 2048², without AMX.

TILES rounds W_eff by thresholds (`definition/thresholds.py`). FLOAT takes half types where there are no tiles, because
torch's operators were slower (docs/internals/cpu.md): it widens W0, W_eff stays in float32, and "split" is "merged". On
processors with AMX for float16 this was not measured."""


def routes(dtype: torch.dtype, rank: int, algorithm: str) -> tuple[int, Path]:
    """Up to how many tokens a call takes `FEW`, and the path of more."""
    few = 0
    for row in ROUTES:
        if dtype in row.dtypes and algorithm in row.algorithms and (not row.needs or has(row.needs)):
            if row.most is None:
                return few, row.path
            few = min(row.most[0], row.most[1] // max(rank, 1))
    raise AssertionError("the last row takes every call")


def forward(
    x: Tensor, bias: Tensor | None, adapter: PackedAdapter, algorithm: str, dropout: Dropout | None
) -> Tensor:
    """`y = x W0ᵀ + b + dropout(x) ΔWᵀ`, as :func:`eager.forward`; x (T, C) on the CPU."""
    if not _fits(adapter, x, None, bias):
        return eager.forward(x, bias, adapter, algorithm, dropout)
    weight, algorithm = adapter.weight, algorithm if dropout is None else "dropout"
    if not x.numel() or not weight.numel():
        empty_sums = x.new_zeros(x.shape[0], weight.shape[0])
        return empty_sums if bias is None else empty_sums.copy_(bias)
    call = _take(adapter, None if dropout is None else drawn(dropout, x, x.shape[1]))
    path = _route(call, x, adapter, algorithm)
    split = dropout is not None or (algorithm == "split" and (path == Path.TILES or x.dtype == torch.float32))
    call.path, call.algorithm = path, Algorithm.SPLIT if split else Algorithm.MERGED
    y = in_large_pages(x.new_empty(x.shape[0], weight.shape[0]))
    call.run("smoa_forward", x=x, bias=bias, y=y)
    _put(adapter, call)
    return y


def backward(
    dy: Tensor, x: Tensor | None, adapter: PackedAdapter, dropout: Dropout | None, *, needs_x: bool
) -> Gradients:
    """Gradients (dX, dA, dB) of :func:`forward`, as :func:`eager.backward`; one mask serves them all."""
    if not _fits(adapter, x, dy, None):
        return eager.backward(dy, x, adapter, dropout, needs_x=needs_x)
    call = None
    if dy.numel() and adapter.weight.numel():
        call = _take(adapter, None if dropout is None else drawn(dropout, dy, adapter.weight.shape[1]))
    dA, dB = (None, None) if x is None else factor_gradients(dy, x, adapter, call)
    dx = input_gradient(dy, adapter, call) if needs_x else None
    _put(adapter, call)
    return dx, dA, dB


def _take(adapter: PackedAdapter, mask: Mask | None) -> Call:
    """The call that the adapter keeps, or a new one. Making one takes as long as a few tokens of a small layer.

    No other thread finds it before it is put back.
    """
    weight, A, B = adapter.weight, adapter.A, adapter.B
    # What `weight.data = …` changes. Freed memory may hold a tensor of another dtype now.
    memory = weight.data_ptr(), weight.dtype, A.data_ptr(), A.dtype, B.data_ptr()
    read = *memory, weight.stride(), A.shape, A.stride(), B.stride()
    call, adapter.layout = adapter.layout, None
    if not isinstance(call, Call) or call.read != read:
        call = Call.of(adapter)
        call.read, call.lasts = read, lies_along_memory(weight)
    return call.scaled(adapter.scaling.item(), mask)


def _put(adapter: PackedAdapter, call: Call | None) -> None:
    """Keep a call without its mask, unless it reads a copy of W0, which may change."""
    if call is not None and call.lasts:
        adapter.layout, call.keep, call.mask = call, None, None


def _route(call: Call, tokens: Tensor, adapter: PackedAdapter, algorithm: str) -> Path:
    """The path for x (T, C), or for dX from dY (T, N), by :func:`routes`, which the call remembers."""
    if algorithm not in call.routes:
        call.routes[algorithm] = routes(tokens.dtype, adapter.A.shape[0], algorithm)
    few, path = call.routes[algorithm]
    return Path.FEW if tokens.shape[0] <= few else path


def input_gradient(dy: Tensor, adapter: PackedAdapter, call: Call | None) -> Tensor:
    """`dX = dY W_eff`, or under dropout `dY W0 + dropoutᵀ(dY ΔW)`; `call` is None where a dimension is 0."""
    dx = in_large_pages(dy.new_empty(dy.shape[0], adapter.weight.shape[1]))
    if call is None:
        return dx.zero_()
    call.path = _route(call, dy, adapter, "dropout" if call.keep else "auto")
    call.algorithm = Algorithm.SPLIT if call.keep else Algorithm.MERGED
    call.run("smoa_input", dy=dy, y=dx)
    return dx


def factor_gradients(
    dy: Tensor, x: Tensor, adapter: PackedAdapter, call: Call | None
) -> tuple[Tensor, Tensor]:
    """(dA, dB): `H_k = s·(dY_kᵀ dropout(x)_k) ∘ W0_k`, `dA_k = B_kᵀ H_k`, `dB_k = H_k A_kᵀ`; zeros in padding rows."""
    dA, dB = adapter.A.new_empty(adapter.A.shape), adapter.B.new_empty(adapter.B.shape)
    if call is None:
        return dA.zero_(), dB.zero_()
    if "gradient" not in call.routes:
        call.routes["gradient"] = 0, gradient_path(dy)
    call.path, call.algorithm = call.routes["gradient"][1], Algorithm.SPLIT
    call.run("smoa_gradient", dy=dy, x=x, dA=dA, dB=dB)
    return dA, dB


def gradient_path(dy: Tensor) -> Path:
    """The path for dA and dB, which is never for few tokens."""
    return routes(dy.dtype, 1, "dropout")[1]


def _fits(adapter: PackedAdapter, x: Tensor | None, dy: Tensor | None, bias: Tensor | None) -> bool:
    """Whether compiled code can run: an exported program names its backend, but may meet another machine or dtype.

    It does not run if shapes disagree, because it would read beyond an operand's end; torch's operators raise then.
    """
    A, B, dtype, (rows, cols) = adapter.A, adapter.B, adapter.weight.dtype, adapter.weight.shape
    return (
        (x is None or (x.shape[1] == cols and x.dtype == dtype and x.is_cpu))
        and (dy is None or (dy.shape[1] == rows and dy.dtype == dtype and dy.is_cpu))
        and (x is None or dy is None or x.shape[0] == dy.shape[0])
        and (bias is None or (bias.shape == (rows,) and bias.dtype == dtype and bias.is_cpu))
        and A.shape[1] == cols
        and B.shape == (rows, A.shape[0])
        and A.dtype == B.dtype
        and (
            type(adapter.layout) is Call
            or (dtype in KINDS and A.dtype in KINDS and unsupported_reason() is None)
        )
    )
