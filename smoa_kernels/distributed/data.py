"""Data parallelism: block labels and ranks are agreed on once, not sent again with every forward."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..checks import check_kind
from ..layers import FusedSMoALinear

__all__ = ["agree_on_buffers", "average_gradients", "ignore_buffers", "smoa_buffers"]


def check_group(process_group: dist.ProcessGroup | None) -> None:
    """Whether it is a process group, or None, which stands for the default one."""
    if process_group is not None:
        check_kind("process_group", process_group, dist.ProcessGroup)


def smoa_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers of `FusedSMoALinear` and PEFT layers (labels, ranks, indices, sketches), by name relative to `model`.

    Args:
        model: any module; what a compiler or a wrapper puts before its names stays.

    Raises:
        TypeError: it is no module.

    Example:
        >>> from smoa_kernels import FusedSMoALinear
        >>> sorted(smoa_buffers(FusedSMoALinear(8, 6)))[:2]
        ['smoa_col_block', 'smoa_col_index']
    """
    check_kind("model", model, nn.Module)
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if any(part.startswith("smoa_") for part in name.split(".")[-2:])
    }


def ignore_buffers(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> None:
    """Prepare `model` for `DistributedDataParallel`, which would broadcast SMoA's buffers at each forward.

    Call it on every process, after the adapters are in and before `model` is wrapped. Where processes run it gives
    all of them rank 0's labels: those of another kind of machine may differ in a coordinate. Names that `model`
    ignores already stay ignored.

    Args:
        model: the module that DistributedDataParallel will be given, not a part of it.
        process_group: over which it will be parallel; the default one when None.

    Raises:
        TypeError: no module, no process group.

    Example:
        >>> from smoa_kernels import FusedSMoALinear
        >>> model = nn.Sequential(FusedSMoALinear(8, 6))
        >>> ignore_buffers(model)
        >>> model = DistributedDataParallel(model)
    """
    check_group(process_group)
    names = smoa_buffers(model)
    if dist.is_available() and dist.is_initialized():
        agree_on_buffers(model, process_group)
    ignored = [*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *names]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)


def agree_on_buffers(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> None:
    """Give every process of a group (the default one when None) the labels and ranks of its first.

    Args:
        model: any module with SMoA layers, which gets new buffers.
        process_group: every process of which calls this.

    Raises:
        TypeError: no module, no process group.

    Example:
        >>> from smoa_kernels import FusedSMoALinear
        >>> model = FusedSMoALinear(8, 6)
        >>> agree_on_buffers(model)
    """
    check_group(process_group)
    source = 0 if process_group is None else dist.get_global_rank(process_group, 0)
    for name, buffer in smoa_buffers(model).items():
        if buffer.is_meta:
            continue
        owner, _, attribute = name.rpartition(".")
        # A new tensor, which tells a PEFT layer that what it derived from the old one is stale.
        shared = buffer.clone()
        dist.broadcast(shared, source, process_group)
        setattr(model.get_submodule(owner), attribute, shared)
    for module in model.modules():
        if isinstance(module, FusedSMoALinear):
            module._relabel()


def average_gradients(
    parameters: Iterable[nn.Parameter], process_group: dist.ProcessGroup | None = None
) -> None:
    """Average the gradients of `parameters` over a group (the default one when None) in each backward.

    For factors that `fully_shard` is told to leave alone (its `ignored_params`), so that every process holds them
    whole beside its part of W0. Gradients must not be accumulated over several backwards.

    Args:
        parameters: factors, the same ones in the same order on every process.
        process_group: whose size the gradients are divided by.

    Raises:
        TypeError: something else than parameters, or than a process group.

    Example:
        >>> from smoa_kernels import FusedSMoALinear
        >>> layer = FusedSMoALinear(8, 6)
        >>> average_gradients([layer.smoa_A, layer.smoa_B])
    """

    def average(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None  # the hook runs once there is one
        dist.all_reduce(parameter.grad, group=process_group)
        parameter.grad /= dist.get_world_size(process_group)

    try:
        parameters = parameters if isinstance(parameters, Tensor) else list(parameters)
    except TypeError as error:  # of what is no iterable, or of a generator's own
        raise TypeError(f"parameters must be parameters, got {parameters!r}") from error
    if not isinstance(parameters, list) or not all(isinstance(p, nn.Parameter) for p in parameters):
        raise TypeError(f"parameters must be parameters, got {parameters!r}")
    check_group(process_group)
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(average)
