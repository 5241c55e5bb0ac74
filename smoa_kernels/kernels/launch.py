"""Where a launch goes: Triton launches on the current device, wherever its arguments are."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["on_device"]

_STAY: AbstractContextManager[None] = nullcontext()


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the current one for the length of a block; nothing to do where it is, or is no CUDA device.

    Torch's own operators look after themselves. The backend calls this where a pass enters it, and the tuner around all
    that it measures.
    """
    if device.type != "cuda" or device.index is None or device.index == torch.cuda.current_device():
        return _STAY
    return torch.cuda.device(device)
