"""Large pages for large results and workspaces: Linux then maps new memory 2 MB at a time instead of 4 KB.

malloc returns the memory of large tensors to the system, so every pass writes to memory that is mapped anew. At 2048²
and 2048 tokens in float32 y and dX are 8,192 small pages, each mapped when it is first written.
"""

from __future__ import annotations

import ctypes
import mmap
import threading

import torch
from torch import Tensor

LARGE = 2**22
"""Bytes from which on a tensor is large; numpy has the same limit."""

_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux only
if _ADVICE is not None:
    _madvise = ctypes.CDLL(None).madvise
    _madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def in_large_pages(tensor: Tensor) -> Tensor:
    """Ask for large pages for a large, contiguous CPU tensor that is not yet written to; returns it.

    This is advice: if Linux does not follow it, nothing changes.
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
    """Return at least `floats` float32 numbers on the CPU, uninitialised, for one call of compiled code.

    Each thread keeps its largest workspace, in large pages, and uses it for small ones too: memory from malloc is in
    small pages, too many for a processor's TLB. :func:`release` gives it back.

    Raises:
        RuntimeError: there is not enough memory; torch's message names the bytes.
    """
    if _kept.memory is not None and _kept.memory.numel() >= floats:
        return _kept.memory
    if 4 * floats < LARGE or _ADVICE is None:
        return like.new_empty(floats, dtype=torch.float32)
    release()
    size = -(-4 * floats // mmap.PAGESIZE) * mmap.PAGESIZE
    try:
        mapped = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # no memory: torch's allocator finds some, or raises the error that its users expect
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
