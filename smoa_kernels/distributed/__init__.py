"""PyTorch's own distributed engine, and the little that SMoA adds to it (docs/distributed.md)."""

from .data import (
    agree_on_buffers,
    average_gradients,
    ignore_buffers,
    smoa_buffers,
)
from .spectra import shared_spectra
from .tensor import ColwiseSMoAParallel, RowwiseSMoAParallel

__all__ = [
    "ColwiseSMoAParallel",
    "RowwiseSMoAParallel",
    "agree_on_buffers",
    "average_gradients",
    "ignore_buffers",
    "shared_spectra",
    "smoa_buffers",
]
