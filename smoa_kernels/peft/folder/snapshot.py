"""`Snapshot`: the state of a model before an injection, which is restored if that fails."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import delete_adapter
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..experts.experts import Experts
from ..layer import SMoALayer
from ..modulated import AdaptedModule

# PEFT and transformers recognise our adapters' parameters by this prefix: they are named `<layer>.smoa.<adapter>.A`.
# When transformers loads `<layer>.smoa.A` from a file, it puts the adapter's name behind the part of the key that
# starts with the prefix. With a dot in the prefix it would put the name at the key's end.
PARAMETER_PREFIX = "smoa"

# Classes of the modules by which an injection replaces others.
_PUT_IN = (SMoALayer, AdaptedModule, AuxiliaryTrainingWrapper)


class Snapshot:
    """The parts of a model, the base or PEFT's around it, that an injection of the configuration `new` changes."""

    def __init__(self, model: nn.Module, new: Any = None) -> None:
        self.model = model
        self._children = [(module, dict(module._modules)) for module in model.modules()]
        self._trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._had_configs, configs = hasattr(model, "peft_config"), getattr(model, "peft_config", {})
        self._configs = {name: held for name, held in configs.items() if held is not new}

    def restore(self, adapter_name: str) -> None:
        """Remove a new adapter; its injection may have failed at any point."""
        for module, children in self._children:
            for name, child in children.items():
                now = module._modules.get(name)
                if now is not child and isinstance(now, _PUT_IN):
                    setattr(module, name, child)
            if isinstance(module, Experts):
                for name in module._modules.keys() - children.keys():
                    delattr(module, name)
        delete_adapter(self.model, adapter_name, prefix=PARAMETER_PREFIX, layer_cls=SMoALayer)
        for parameter, before in self._trainable:
            parameter.requires_grad_(before)
        configs: Any = getattr(self.model, "peft_config", {})
        configs.pop(adapter_name, None)
        if adapter_name in self._configs:
            configs[adapter_name] = self._configs[adapter_name]
        if not (configs or self._had_configs) and "peft_config" in vars(self.model):
            del self.model.peft_config
