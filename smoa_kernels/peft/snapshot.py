"""`snapshot`: the state of a model before an injection, which is restored if that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft.tuners.tuners_utils import delete_adapter
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .experts.experts import Experts
from .layer import SMoALayer

# Prefix of the names of an adapter's parameters.
PARAMETER_PREFIX = "smoa_"

# Classes of the modules by which an injection replaces others.
_PUT_IN = (SMoALayer, Experts, AuxiliaryTrainingWrapper)


def snapshot(model: nn.Module) -> Callable[[str], None]:
    """Remember the parts of a model, the base or PEFT's around it, that an injection changes.

    The returned function removes a new adapter, by name, whose injection may have failed at any point.
    """
    all_children = [(module, dict(module._modules)) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    had_configs = hasattr(model, "peft_config")

    def restore(adapter_name: str) -> None:
        for module, children in all_children:
            for name, child in children.items():
                now = module._modules.get(name)
                if now is not child and isinstance(now, _PUT_IN):
                    setattr(module, name, child)
            if isinstance(module, Experts):
                for name in module._modules.keys() - children.keys():
                    delattr(module, name)
        delete_adapter(model, adapter_name, prefix=PARAMETER_PREFIX, layer_cls=SMoALayer)
        for parameter, before in trainable:
            parameter.requires_grad_(before)
        configs: Any = getattr(model, "peft_config", {})
        configs.pop(adapter_name, None)
        if not (configs or had_configs) and "peft_config" in vars(model):
            del model.peft_config

    return restore
