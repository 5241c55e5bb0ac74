"""Labels of rows and columns: made, checked, and packed with a partition's other tensors into one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_dense


def label_dtype(num_blocks: int) -> torch.dtype:
    """uint8 where it fits, else int32: gloo and NCCL cannot send int16."""
    return torch.uint8 if num_blocks <= 256 else torch.int32


_ALIGNMENT = 16  # bytes, as Triton asks of a pointer that it reads vectors from


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def sections(shape: Sequence[int], num_blocks: int) -> list[tuple[torch.dtype, int]]:
    """The dtypes and sizes of :meth:`BlockPartition.tensors`."""
    labels, index = ([(dtype, size) for size in shape] for dtype in (label_dtype(num_blocks), torch.int64))
    return [*labels, *index, *[(torch.int32, num_blocks + 1)] * 2]


def pack(tensors: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
    """`BlockPartition.plan` of the tensors and sizes of a partition: int64 N, C, K and the sizes, then the tensors."""
    shape = [tensor.shape[0] for tensor in tensors[:2]]
    head = torch.tensor([*shape, len(numbers) // 2 - 1, *numbers], device=tensors[0].device)
    parts = [part.contiguous().view(torch.uint8) for part in (head, *tensors)]
    return torch.cat([F.pad(part, [0, _padded(len(part)) - len(part)]) for part in parts])


def unpack(plan: Tensor, shape: Sequence[int], sizes: Sequence[int]) -> tuple[list[Tensor], Sequence[int]]:
    """The tensors in a plan, views of it, and the sizes."""
    start, tensors = _padded(8 * (3 + len(sizes))), []
    for dtype, size in sections(shape, len(sizes) // 2 - 1):
        end = start + size * dtype.itemsize
        tensors.append(plan[start:end].view(dtype))
        start = _padded(end)
    return tensors, sizes


def labels_of(order: Tensor, num_blocks: int, granule: int, size: int) -> Tensor:
    """Labels of `size` coordinates: `torch.tensor_split` cuts the order of their granules into blocks."""
    labels = torch.empty_like(order)
    for block, chunk in enumerate(order.tensor_split(num_blocks)):
        labels[chunk] = block
    return labels.repeat_interleave(granule)[:size]


def granularity(sides: Sequence[Tensor]) -> int:
    """The greatest common divisor of the positions where labels (n,), or those of any expert (E, n), change."""
    stacks = [torch.atleast_2d(side) for side in sides]
    places = [(side[:, 1:] != side[:, :-1]).any(0).nonzero().flatten() + 1 for side in stacks]
    return math.gcd(*torch.cat(places).tolist()) or max(1, *(side.shape[1] for side in stacks))


def check_range(name: str, labels: Tensor, num_blocks: int) -> None:
    """Labels must lie in [0, num_blocks)."""
    if not labels.numel():
        return
    lowest, highest = (int(end) for end in labels.aminmax())
    if not 0 <= lowest <= highest < num_blocks:
        raise ValueError(
            f"{name} must lie in [0, {num_blocks}) for num_blocks={num_blocks}, "
            f"got labels from {lowest} to {highest}"
        )


def check_labels(name: str, labels: Tensor) -> None:
    """Labels must be a vector of integers that holds numbers."""
    check_dense(name, labels, integer=True)
    if labels.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {tuple(labels.shape)}")
    if labels.is_meta:
        raise ValueError(f"{name} must hold numbers, got a meta tensor")
