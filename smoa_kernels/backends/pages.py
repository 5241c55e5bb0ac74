"""Large pages for large results and workspaces: Linux maps 2 MB of new memory at a time then, not 4 KB.

malloc gives what large tensors took back to the system, so every pass writes to memory that is mapped anew. y and dX of
2048² and 2048 tokens in float32 are 8,192 small pages, each mapped when it is first written to.
"""

from __future__ import annotations

import ctypes
import mmap
import threading

import torch
from torch import Tensor

__all__ = ["LARGE", "in_large_pages", "release", "workspace"]

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


class _Kept(threading.local):
    memory: Tensor | None = None


_kept = _Kept()


def workspace(like: Tensor, floats: int) -> Tensor:
    """At least so many float32 numbers for one call of compiled code, on the CPU: whatever was in them is lost.

    A large workspace is the thread's own, in large pages, and kept, for small ones too: malloc would hand out memory in
    small pages, of which a processor finds too few at a time. :func:`release` gives it back.

    Raises:
        RuntimeError: there is not enough memory; torch's own, which names the bytes.
    """
    if _kept.memory is not None and _kept.memory.numel() >= floats:
        return _kept.memory
    if 4 * floats < LARGE or _ADVICE is None:
        return like.new_empty(floats, dtype=torch.float32)
    release()
    size = -(-4 * floats // mmap.PAGESIZE) * mmap.PAGESIZE
    try:
        mapped = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # no memory: torch's allocator finds some, or says so as its users expect
        return like.new_empty(floats, dtype=torch.float32)
    _kept.memory = in_large_pages(torch.frombuffer(mapped, dtype=torch.float32))
    return _kept.memory


def release() -> int:
    """Give this thread's :func:`workspace` back to the system; returns its bytes.

    Example:
        >>> kept = release()
        >>> release()
        0
    """
    memory, _kept.memory = _kept.memory, None
    return 0 if memory is None else memory.nbytes
