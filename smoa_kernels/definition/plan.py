"""A partition as one tensor of bytes, which operators take: a head, labels, indices and offsets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


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
