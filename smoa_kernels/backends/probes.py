"""Random operands for comparing the kernels with torch's operators, and how far two right results may lie apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..definition.packed import PackedAdapter

# As a share of the norm of a row or column. In half types twice the spacing of numbers; in TF32 more, since cuBLAS may
# truncate operands; in float32 long sums have different orders.
ALLOWED = {"bf16": 2.0**-6, "fp16": 2.0**-9, "tf32": 2.0**-8, "fp32": 2.0**-14}
_FEWEST = 32  # numbers of a row or column that is compared by itself
_PANEL = (
    2**20
)  # numbers, about, that are compared at a time: their float32 copies take several times 4 bytes each
# Each number must satisfy |ours - eager's| <= share * (|eager's| + _OUTLIER * r). r is the root mean square of its row
# or column, whichever is larger. Rounding the terms of a sum moves a number by share * r / 7 on average, so two
# right results differ by share * r / 5. 4 * share * r is 20 times that.
_OUTLIER = 4


def probe(adapter: Any, tensors: Sequence[Tensor | None], tokens: int) -> tuple[Any, ...]:
    """Operands of about so many tokens in a call's layout, whose numbers are random and always the same.

    W0 is the call's, unless it has only zeros, or numbers that are not finite. Every second block has half the rank,
    and of experts the first has `tokens` pairs, the others none and one in turn. Of `tensors`, activations have two
    dimensions, and `ends` comes last. Returns the number of tokens, no size of W0, then the adapter and the tensors.
    """
    weight, rho = adapter.weight, adapter.A.shape[-2]
    like = partial(_like, torch.Generator(weight.device).manual_seed(0))
    if not 0 < float(torch.linalg.vector_norm(weight, dtype=torch.float32)) < math.inf:
        weight = like(weight, scale=weight.shape[-1] ** -0.5)
    ranks = [rho // (1 + k % 2) for k in range(len(adapter.ranks))]
    changed = {"weight": weight, "A": like(adapter.A), "B": like(adapter.B, scale=max(rho, 1) ** -0.5)}
    changed |= {"ranks": like(adapter.ranks, of=torch.tensor(ranks)), "scaling": like(adapter.scaling, of=1)}
    if isinstance(adapter, PackedAdapter):
        tokens = next(rows for rows in range(tokens, tokens + 3) if rows not in weight.shape)
        found = [like(one, tokens if one is not None and one.ndim == 2 else 0) for one in tensors]
        return tokens, replace(adapter, block_ranks=ranks, **changed), *found
    pairs = torch.arange(len(weight), device=weight.device) % 2
    pairs[0] = tokens
    tokens += len(weight) // 2
    found = [*(like(one, tokens) for one in tensors[:-1]), like(tensors[-1], of=pairs.cumsum(0))]
    return tokens, replace(adapter, **changed), *found


def _like(
    draw: torch.Generator, tensor: Tensor | None, rows: int = 0, scale: float = 1.0, of: Any = None
) -> Any:
    """Random numbers, or those of `of`, in new memory for which Triton compiles the same; with `rows` rows, if given.

    Strides are as small as they can be, but 1 stays 1, and remainders by 16 stay, also that of the address.
    """
    if tensor is None:
        return None
    shape, stride, span = [*tensor.shape], [*tensor.stride()], 1
    if rows:
        shape[0] = rows
    for dim in sorted(range(tensor.ndim), key=tensor.stride):
        stride[dim] = min(stride[dim], span + 16 + (stride[dim] - span) % 16) or 16
        span += max(shape[dim] - 1, 0) * stride[dim]
    first = tensor.data_ptr() % 16 // tensor.element_size()
    memory = tensor.new_empty(first + span)
    found = memory.as_strided(shape, stride, first)
    if of is None:
        memory.normal_(generator=draw).mul_(scale)
        return found
    return found.copy_(torch.as_tensor(of))


def distance(found: Any, expected: Any, allowed: float) -> float | None:
    """The largest distance of a row, column or number over the allowed one; None if an expected result proves nothing.

    It proves nothing if it has only zeros, or numbers that are not finite. Results are tensors, or tuples with None.
    """
    shares: list[Tensor] = []
    for ours, theirs in zip(_matrices(found), _matrices(expected), strict=True):
        if not 0 < float(torch.linalg.vector_norm(theirs, dtype=torch.float32)) < math.inf:
            return None
        rows = max(_FEWEST, _PANEL // theirs.shape[1])
        for panels in zip(ours.split(rows), theirs.split(rows), strict=True):
            shares += _shares(*panels, allowed)
    return float(torch.stack(shares).max()) if shares else None


def _shares(ours: Tensor, theirs: Tensor, allowed: float) -> Iterator[Tensor]:
    # Subnormal numbers have the spacing of the smallest normal one.
    kind = torch.finfo(theirs.dtype)
    floor = kind.smallest_normal * kind.eps * max(theirs.shape) ** 0.5
    error, usual = (ours.float() - theirs.float()).abs(), theirs.new_zeros((), dtype=torch.float32)
    long: list[tuple[int, ...]] = [(dim,) for dim in (0, 1) if theirs.shape[dim] >= _FEWEST]
    for dim in long or [(0, 1)]:
        norm = torch.linalg.vector_norm(theirs, dim=dim, keepdim=True, dtype=torch.float32)
        apart = torch.linalg.vector_norm(error, dim=dim, keepdim=True)
        yield (apart / (allowed * norm + floor)).max()
        usual = torch.maximum(usual, norm * (norm.numel() / theirs.numel()) ** 0.5)
    yield (error / (allowed * (theirs.abs() + _OUTLIER * usual) + floor)).max()


def _matrices(results: Any) -> Iterator[Tensor]:
    """The results that are not None; those of all experts as one matrix."""
    for result in results if isinstance(results, tuple) else (results,):
        if result is not None:
            yield result.flatten(0, -2)
