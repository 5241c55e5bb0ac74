"""The memory of a call, to the byte: the tensors saved for backward, and the peak above the memory in use before.

On a GPU the CUDA allocator counts. On the CPU all allocations and releases that PyTorch's allocator reports to its
profiler are added up, in order. That is exact and repeatable, while a process's high-water mark moves in pages and
includes memory that the C library does not return. Neither includes a BLAS library's own memory.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from smoa_kernels.backends import pages

from .protocol import DEVICE, halves
from .providers import Case


def footprint(layer: nn.Module, case: Case) -> dict[str, int]:
    """Bytes of one training pass of a layer, beyond its parameters, x and dY.

    - saved: kept by the forward for the backward, with x, without parameters and buffers;
    - peak: the most that lives at once in forward and backward, with y and the gradients;
    - forward_workspace: the most that the forward holds beyond y and its saved tensors;
    - backward_workspace: the most that the backward holds beyond its inputs and the gradients it returns, even if it
      frees inputs on the way.
    """
    x = case.input()
    forward, backward = halves(layer, [x], case.output_gradient())
    pages.release()
    forward()  # before counting, because the first call builds tables that stay
    backward()
    saved = saved_bytes(layer, x)
    forward_peak, after_forward = allocated(forward)
    backward_peak, _ = allocated(backward)
    gradients = x.nbytes + sum(p.nbytes for p in layer.parameters() if p.requires_grad)
    workspace = pages.release()  # a kept workspace, whose allocation the profiler would not see
    return {
        "saved": saved,
        "peak": max(forward_peak, after_forward + backward_peak) + workspace,
        "forward_workspace": forward_peak - after_forward + workspace,
        "backward_workspace": max(0, backward_peak - gradients) + workspace,
    }


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages that one forward saves for backward, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    storages: dict[int, int] = {}
    kept: list[Tensor] = []  # alive until counted; otherwise an address could be used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    kept.clear()  # breaks a cycle that would keep everything: the graph's nodes hold `pack`, which holds this
    return sum(storages.values())


def allocated(function: Callable[[], object]) -> tuple[int, int]:
    """Bytes allocated beyond the present ones: at the call's peak, and after it."""
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
