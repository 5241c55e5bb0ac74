"""SMoA's additions to PyTorch's distributed training (docs/distributed.md)."""

from .data_parallel import agree_on_buffers, average_gradients, ignore_buffers, smoa_buffers
from .spectra import shared_spectra
from .tensor_parallel import ColwiseSMoAParallel, RowwiseSMoAParallel

__all__ = [
    "ColwiseSMoAParallel",
    "RowwiseSMoAParallel",
    "agree_on_buffers",
    "average_gradients",
    "ignore_buffers",
    "shared_spectra",
    "smoa_buffers",
]
