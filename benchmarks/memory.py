"""What a call holds in memory, to the byte: what is saved for backward, and the peak above what lived before.

On a GPU the CUDA allocator counts. On the CPU every allocation and release that PyTorch's allocator reports to its
profiler is added up, in order: exact and repeatable, where a process' high-water mark moves in pages and keeps what
the C library does not give back. What a BLAS library allocates for itself is seen by neither.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from smoa_kernels.backends import pages

from .protocol import DEVICE, halves
from .providers import Case


@dataclass(frozen=True)
class Footprint:
    """Bytes of one training pass of a layer, beyond its parameters, x and dY.

    Attributes:
        saved: what the forward keeps for the backward, x included, parameters and buffers not.
        peak: most that lives at once in forward and backward, y and the gradients included.
        forward_workspace: most that the forward holds beyond y and what it saves.
        backward_workspace: most that the backward holds beyond its inputs and the gradients it returns; what it
            frees of its inputs on the way counts against it.
    """

    saved: int
    peak: int
    forward_workspace: int
    backward_workspace: int

    def record(self) -> dict[str, int]:
        """As JSON holds it."""
        return asdict(self)


def footprint(layer: nn.Module, case: Case) -> Footprint:
    """Measure one forward and one backward of a layer."""
    x = case.input()
    forward, backward = halves(layer, [x], case.output_gradient())
    pages.release()
    forward()  # whatever is built once is built before anything is counted
    backward()
    saved = saved_bytes(layer, x)
    forward_peak, after_forward = allocated(forward)
    backward_peak, _ = allocated(backward)
    gradients = x.nbytes + sum(p.nbytes for p in layer.parameters() if p.requires_grad)
    workspace = pages.release()  # which lives all the time, unseen by the profiler
    return Footprint(
        saved=saved,
        peak=max(forward_peak, after_forward + backward_peak) + workspace,
        forward_workspace=forward_peak - after_forward + workspace,
        backward_workspace=max(0, backward_peak - gradients) + workspace,
    )


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages that one forward saves for backward, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    storages: dict[int, int] = {}
    kept: list[Tensor] = []  # alive until counted, or an address could be given out again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    kept.clear()  # the graph's nodes hold `pack`, which holds this: nothing would ever be released
    return sum(storages.values())


def allocated(function: Callable[[], object]) -> tuple[int, int]:
    """Bytes above what is allocated now: at the call's peak, and when it has returned."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    ordered = [size for _, size in sorted(changes, key=lambda change: change[0])]
    levels = list(itertools.accumulate(ordered, initial=0))
    return max(levels), levels[-1]
