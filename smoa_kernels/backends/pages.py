"""Large pages for large results: Linux maps 2 MB of new memory at a time then, not 4 KB.

malloc gives what large tensors took back to the system, so every pass writes to memory that is mapped anew. y and dX of
2048² and 2048 tokens in float32 are 8,192 small pages, each mapped when it is first written to.
"""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

__all__ = ["LARGE", "in_large_pages"]

LARGE = 2**22
"""Bytes from which on a tensor is large: numpy asks for large pages from the same size on."""

_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # of Linux alone
if _ADVICE is not None:
    _madvise = ctypes.CDLL(None).madvise
    _madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def in_large_pages(tensor: Tensor) -> Tensor:
    """Ask for large pages behind a contiguous tensor that is large, on the CPU and not yet written to; returns it.

    It is advice: where Linux does not follow it, nothing changes.
    """
    if tensor.nbytes >= LARGE and tensor.is_cpu and _ADVICE is not None:
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        first = start + -start % mmap.PAGESIZE
        _madvise(first, end - first, _ADVICE)
    return tensor
