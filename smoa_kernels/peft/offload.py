"""Loads base weights that accelerate offloaded, or gathers those that DeepSpeed ZeRO-3 partitioned.

SMoA reads W0 without calling the base layer, so the layer's own hooks do not load it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from peft.utils.integrations import gather_params_ctx
from torch import nn

_NOTHING = nullcontext()


def present(layer: Any) -> AbstractContextManager[None]:
    """Load the weights of a tuner layer, its base's and its adapters', that accelerate offloaded, within the block."""
    weight = layer.get_base_layer()._parameters.get(layer.parameter_name)  # asked in each forward
    if weight is None or not weight.is_meta:
        return _NOTHING
    return _onloaded([module for module in layer.modules() if _hook(module) is not None])


@contextmanager
def _onloaded(modules: list[nn.Module]) -> Iterator[None]:
    # A loaded parameter is a new object each time, so no optimiser would see its gradient.
    if torch.is_grad_enabled() and any(p.requires_grad for m in modules for p in m.parameters(recurse=False)):
        raise RuntimeError(
            "the adapter's weights are offloaded and cannot be trained so: inject the adapter after the base model "
            "was offloaded, or turn gradients off"
        )
    hooks = [(module, _hook(module)) for module in modules]
    for module, hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in hooks:
            hook.post_forward(module, None)


def execution_device(base: nn.Module) -> torch.device | None:
    """The device on which an offloaded base layer computes; None for one that is not offloaded."""
    hook = _hook(base)
    return None if hook is None else torch.device(hook.execution_device)


def gathered(layer: Any) -> AbstractContextManager[None]:
    """Gather the base weight of a tuner layer that ZeRO-3 partitions, to be read within the block."""
    parameters = list(layer.get_base_layer().parameters(recurse=False))
    return cast("AbstractContextManager[None]", gather_params_ctx(parameters, None))


def check_present(weight: torch.Tensor) -> None:
    """Raise if W0 is partitioned and would read as empty."""
    if hasattr(weight, "ds_id") and weight.numel() == 0:
        raise RuntimeError(
            "W0 is partitioned by DeepSpeed ZeRO-3, which gathers it only where its engine runs forward and backward: "
            "elsewhere, read or merge the layer inside deepspeed.zero.GatheredParameters(layer.parameters())"
        )


def _hook(module: nn.Module) -> Any:
    """accelerate's hook that loads a module's weights for its forward; None if there is none."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        if getattr(part, "offload", False):
            return part
    return None
