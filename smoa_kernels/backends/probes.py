"""Random operands for comparing the kernels with torch's operators, and how much two right results may differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..definition.experts import ExpertsAdapter
from ..definition.packed import PackedAdapter

# In half types twice the spacing of numbers; in TF32 more, since cuBLAS may truncate operands; in float32 long sums
# have different orders.
ALLOWED = {"bf16": 2.0**-6, "fp16": 2.0**-9, "tf32": 2.0**-8, "fp32": 2.0**-14}
# Numbers, about, that are compared at a time: their float32 copies take several times 4 bytes each.
_PANEL = 2**20


def probe(run: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any], rows: int) -> Any:
    """The result of a call with `rows` tokens, or pairs, whose numbers are random and always the same.

    W0 is the call's, unless it has only zeros, or numbers that are not finite. Every second block has half the rank,
    and of experts the first has nearly all pairs, the others none and one pair in turn.
    """
    adapter = next(value for value in args if isinstance(value, (PackedAdapter, ExpertsAdapter)))
    weight, rho = adapter.weight, adapter.A.shape[-2]
    like = partial(_like, torch.Generator(weight.device).manual_seed(0))
    ranks = [rho // (1 + k % 2) for k in range(len(adapter.ranks))]
    changed: dict[str, Any] = {"A": like(adapter.A), "B": like(adapter.B)}
    changed |= {
        "ranks": like(adapter.ranks, of=ranks),
        "scaling": like(adapter.scaling, of=max(rho, 1) ** -0.5),
    }
    if not _says_something(weight):
        changed["weight"] = like(weight)
    if isinstance(adapter, PackedAdapter):
        changed["block_ranks"] = ranks

    def operand(value: Any, rows: int = 0) -> Any:
        if value is adapter:
            return replace(adapter, **changed)
        if not isinstance(value, Tensor):
            return value
        if value.is_floating_point():
            return like(value, rows if value.ndim == 2 else 0)
        ends = (rows - torch.arange(len(value)).flip(0) // 2).clamp(min=0)  # of experts
        return like(value, of=ends)

    return run(*(operand(value, rows) for value in args), **options)


def _like(draw: torch.Generator, tensor: Tensor, rows: int = 0, of: Any = None) -> Tensor:
    """Random numbers, or those of `of`, in new memory for which Triton compiles the same; with `rows` rows, if given.

    Strides that are 1 stay 1, and remainders by 16 stay, also that of the address. Other strides become no longer than
    a dense tensor's may be, so numbers of activations may share memory.
    """
    shape = [rows or tensor.shape[0], *tensor.shape[1:]] if tensor.ndim else []
    most = 16 + math.prod(shape) // max(1, min(shape, default=1)) // 16 * 16
    strides = [min(stride, most + stride % 16) or 16 for stride in tensor.stride()]
    first = tensor.data_ptr() % 16 // tensor.element_size()
    span = 1 + sum(max(size - 1, 0) * stride for size, stride in zip(shape, strides, strict=True))
    memory = tensor.new_empty(first + span)
    result = memory.as_strided(shape, strides, first)
    if of is not None:
        return result.copy_(torch.as_tensor(of))
    memory.normal_(generator=draw)
    return result


def distance(results: Any, expected: Any, allowed: float) -> float:
    """The largest distance of a number over the allowed one, a share of the number and of its row's or column's size.

    Rounding the terms of a sum moves it by a seventh of `allowed * size` on average, so two right results differ by a
    fifth, and four times the size is 20 times that. The size is the root mean square of the row or the column,
    whichever is larger. Results are tensors, or tuples with None.

    Raises:
        ArithmeticError: an expected result proves nothing: it has only zeros, or numbers that are not finite.
    """
    shares: list[Tensor] = []
    for result, reference in zip(_matrices(results), _matrices(expected), strict=True):
        if not _says_something(reference):
            raise ArithmeticError("torch's operators give zeros, or numbers that are not finite")
        # Subnormal numbers have the spacing of the smallest normal number.
        floor = torch.finfo(reference.dtype).smallest_normal * torch.finfo(reference.dtype).eps
        rows = max(32, _PANEL // reference.shape[1])
        for part, right_part in zip(result.split(rows), reference.split(rows), strict=True):
            right = right_part.float()
            sizes = (right.square().mean(dim, keepdim=True).sqrt() for dim in (0, 1))
            size = right.abs() + 4 * torch.maximum(*sizes)
            shares.append(((part.float() - right).abs() / (allowed * size + floor)).max())
    return float(torch.stack(shares).max())


def _says_something(tensor: Tensor) -> bool:
    return 0 < float(torch.linalg.vector_norm(tensor, dtype=torch.float32)) < math.inf


def _matrices(results: Any) -> Iterator[Tensor]:
    """The results that are not None; those of all experts as one matrix."""
    for result in results if isinstance(results, tuple) else (results,):
        if result is not None:
            yield result.flatten(0, -2)
