"""Buffers for weights that are dequantised for one product, used again by the next."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["ScratchPool"]


class ScratchPool:
    """Lends buffers by device, stream and dtype; as many stay as were ever lent at once, as large as was asked for.

    A buffer that is out is nobody else's, so that a product inside another's block (a recomputation in backward) or
    in another thread gets its own; one that is back is lent again only on its stream, behind the work that read it.
    """

    def __init__(self) -> None:
        self._free: defaultdict[tuple[object, ...], list[Tensor]] = defaultdict(list)

    @contextmanager
    def borrow(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
        """An uninitialised contiguous tensor, which must not be referred to after the block."""
        free = self._free[device, dtype, _stream(device)]
        size = math.prod(shape)
        try:
            buffer = free.pop()
        except IndexError:
            buffer = None
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # or it could not be written to outside of that mode
                buffer = torch.empty(size, dtype=dtype, device=device)
        try:
            yield buffer[:size].view(*shape)
        finally:
            free.append(buffer)


def _stream(device: torch.device) -> object:
    if device.type not in ("cuda", "xpu"):
        return None
    return torch.get_device_module(device).current_stream(device).stream_id
