"""Processes take labels and ranks from the first process, once, and average the gradients of replicated factors."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..adapter import Adapter
from ..checks import check_kind


def first_process(process_group: dist.ProcessGroup | None) -> int:
    """The global rank of a group's first process; a TypeError for -100, which `dist.new_group` returns to others."""
    if process_group is None:
        return 0
    check_kind("process_group", process_group, dist.ProcessGroup)
    return dist.get_global_rank(process_group, 0)


def smoa_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return SMoA's buffers (labels, ranks, sketches, scales) by their names in `model`.

    Args:
        model: any module with `FusedSMoALinear` or PEFT layers, compiled or wrapped.

    Example:
        >>> from smoa_kernels import FusedSMoALinear
        >>> sorted(smoa_buffers(FusedSMoALinear(8, 6)))[:2]
        ['smoa.col_block', 'smoa.ranks']
    """
    return {
        f"{name}.{key}" if name else key: buffer
        for name, adapter in model.named_modules()
        if isinstance(adapter, Adapter)
        for key, buffer in adapter.named_buffers(recurse=False)
    }


def ignore_buffers(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> None:
    """Keep `DistributedDataParallel` from broadcasting SMoA's buffers at each forward.

    Call it on every process, after the adapters are injected and before `model` is wrapped. In a process group it
    gives all processes the labels of the first one, since another kind of machine may sort a coordinate into another
    block. Names that `model` told DistributedDataParallel to ignore before stay ignored.

    Args:
        model: the module that will be wrapped, not a part of it.
        process_group: the group that it will be wrapped for; the default group when None.

    Example:
        >>> from smoa_kernels import FusedSMoALinear
        >>> model = nn.Sequential(FusedSMoALinear(8, 6))
        >>> ignore_buffers(model)
        >>> model = DistributedDataParallel(model)
    """
    names = smoa_buffers(model)
    if dist.is_available() and dist.is_initialized():
        agree_on_buffers(model, process_group)
    ignored = [*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *names]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)


def agree_on_buffers(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> None:
    """Give every process of a group the labels and ranks of its first process. All of them must call it.

    Args:
        model: any module with SMoA layers. It gets new buffers.
        process_group: the default group when None.

    Example:
        >>> from smoa_kernels import FusedSMoALinear
        >>> model = FusedSMoALinear(8, 6)
        >>> agree_on_buffers(model)

    Raises:
        TypeError: this process is not in the group.
    """
    source = first_process(process_group)
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    for adapter in adapters:
        for key, buffer in adapter.named_buffers(recurse=False):
            if not buffer.is_meta:
                # A new tensor tells the adapter that what was made of the old tensor is stale.
                shared = buffer.clone()
                dist.broadcast(shared, source, process_group)
                setattr(adapter, key, shared)
    for adapter in adapters:  # after all broadcasts: an error here leaves no other process waiting
        if adapter.has_blocks:
            adapter.read_labels()  # now, because the next forward may be compiled


def average_gradients(
    parameters: Iterable[nn.Parameter], process_group: dist.ProcessGroup | None = None
) -> None:
    """Average the gradients of `parameters` over a process group in each backward.

    It is for factors that `fully_shard` leaves alone (its `ignored_params`), so that every process holds them whole
    beside its part of W0. Gradients must not be accumulated over several backwards.

    Args:
        parameters: the factors, the same ones in the same order on every process.
        process_group: the default group when None.

    Example:
        >>> from smoa_kernels import FusedSMoALinear
        >>> layer = FusedSMoALinear(8, 6)
        >>> average_gradients([layer.smoa.A, layer.smoa.B])

    Raises:
        TypeError: this process is not in the group.
    """
    first_process(process_group)

    def average(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None  # the hook runs after it was set
        dist.all_reduce(parameter.grad, group=process_group)
        parameter.grad /= dist.get_world_size(process_group)

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(average)
