"""One process computes the spectral orders of the weights and sends them to the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import Granule, granules, on_sides
from ..definition.spectral_order import order_source, spectral_orders
from .data_parallel import first_process


@contextmanager
def shared_spectra(process_group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Within this context only the first process of a group sorts weights; the others receive its order.

    Inject adapters within it, on every process of the group, into the same layers in the same order. It saves the
    other processes an eigendecomposition per layer, and all labels come from one machine. Blocks of another order
    than the spectral order need no communication: every process computes the same.

    Args:
        process_group: the default group when None.

    Example:
        >>> from smoa_kernels import FusedSMoALinear
        >>> with shared_spectra():
        ...     layer = FusedSMoALinear(8, 6, r=4, num_blocks=2)

    Raises:
        TypeError: this process is not in the group.
    """
    source = first_process(process_group)
    first = dist.get_rank() == source

    def orders(weight: Tensor, granule: Granule) -> tuple[Tensor, Tensor]:
        if first:
            rows, cols = spectral_orders(weight, granule)
        else:
            counts = map(granules, weight.shape[-2:], on_sides(granule))
            rows, cols = (torch.empty(count, dtype=torch.int64, device=weight.device) for count in counts)
        for order in (rows, cols):
            dist.broadcast(order, source, process_group)
        return rows, cols

    token = order_source.set(orders)
    try:
        yield
    finally:
        order_source.reset(token)
