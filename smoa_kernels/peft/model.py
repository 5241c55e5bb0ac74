"""`SMoAModel`: puts SMoA layers into a model, and everything that concerns all of them."""

from __future__ import annotations

import warnings
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, delete_adapter
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..partition import BlockPartition
from .config import SMoAConfig
from .layer import LayerSettings, Linear, SMoALayer
from .loading import check_adapter

__all__ = ["SMoAModel"]


class SMoAModel(BaseTuner):  # type: ignore[misc]  # PEFT's types are not followed
    """A model with SMoA adapters; what `peft.get_peft_model(model, SMoAConfig(...))` wraps.

    Args:
        model: the model to adapt, changed in place.
        config: of the first adapter.
        adapter_name: of the first adapter.
        low_cpu_mem_usage: leave the adapter on the meta device, to be loaded.
    """

    prefix: str = "smoa_"
    tuner_layer_cls = SMoALayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; where it fails the model is left as it was."""
        is_new = not any(adapter_name in layer.smoa_A for layer in _layers(model))
        awaits_weights = self.peft_config[adapter_name].is_from_file and not _layers(model)
        # To be restored should these weights turn out not to fit.
        self.trainable_before = [p for p in model.parameters() if p.requires_grad] if awaits_weights else []
        self._orders: dict[tuple[Any, ...], BlockPartition] = {}  # of this injection
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            if is_new:
                remove_adapter(model, adapter_name)
            raise
        finally:
            self._orders.clear()

    def _create_and_replace(
        self,
        peft_config: SMoAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        settings = layer_settings(peft_config, current_key)
        try:
            if isinstance(target, SMoALayer):
                target.update_layer(adapter_name, settings, self._spectral_order)
                return
            new_module = _new_layer(target, adapter_name, settings, self._spectral_order)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{current_key}: {error}") from error
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _spectral_order(self, weight: Tensor, num_blocks: int) -> BlockPartition:
        """Blocks of a weight, computed once for layers that share it."""
        key = (weight.data_ptr(), weight.shape, weight.stride(), num_blocks)
        if key not in self._orders:
            self._orders[key] = BlockPartition.from_weight(weight, num_blocks)
        return self._orders[key]

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: SMoAConfig, adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        # Labels that nothing brought are computed before they are saved; in place, so the state dict sees them.
        for layer in _layers(model):
            if adapter_name in layer.smoa_A and not layer.smoa_A[adapter_name].is_meta:
                layer.partition(adapter_name)
        return super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SMoAConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> Any:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        try:
            check_adapter(model, adapter_name, remapped, strict_base=config.strict_base)
        except ValueError:
            if any(_awaits_labels(layer, adapter_name) for layer in _layers(model)):
                # Put in by the very call that was to fill it.
                remove_adapter(model, adapter_name)
                _forget(model, adapter_name)
            raise
        return remapped


def layer_settings(config: SMoAConfig, name: str) -> LayerSettings:
    """What `config` says about the layer `name`, its patterns applied."""

    def matching(pattern: dict[str, Any], default: Any) -> Any:
        return pattern.get(get_pattern_key(pattern.keys(), name), default)

    r = matching(config.rank_pattern, config.r)
    num_blocks = matching(config.num_blocks_pattern, config.num_blocks)
    usual = (r, num_blocks) == (config.r, config.num_blocks)
    alpha = matching(config.alpha_pattern, config.smoa_alpha)
    return LayerSettings(r, num_blocks, config.block_ranks if usual else None, alpha, config)


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter out of every layer, and layers that hold no other adapter out of the model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SMoALayer) and set(module.smoa_A) <= {adapter_name}:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base_layer)
    delete_adapter(model, adapter_name, prefix=SMoAModel.prefix, layer_cls=SMoALayer)


def _forget(model: nn.Module, adapter_name: str) -> None:
    """Undo what injection did beside the layers, once they no longer hold the adapter."""
    configs: Any = getattr(model, "peft_config", {})
    configs.pop(adapter_name, None)
    if configs:
        return
    for module in list(model.modules()):
        if isinstance(module, SMoAModel):
            for parameter in module.trainable_before:
                parameter.requires_grad_(True)
        elif module.__dict__.get("peft_config") is configs:
            del module.peft_config


def _layers(model: nn.Module) -> list[SMoALayer]:
    return [module for module in model.modules() if isinstance(module, SMoALayer)]


def _awaits_labels(layer: SMoALayer, adapter_name: str) -> bool:
    return adapter_name in layer.smoa_A and bool((layer.smoa_ranks[adapter_name] < 0).any())


def _new_layer(target: nn.Module, adapter_name: str, settings: LayerSettings, spectral_order: Any) -> Linear:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, nn.Linear):
        stored_transposed = False
    elif isinstance(base, Conv1D):
        stored_transposed = True
    else:
        raise ValueError(
            f"Target module {target} is not supported. Currently, only the following modules are supported: "
            "`torch.nn.Linear`, `transformers.pytorch_utils.Conv1D`."
        )
    if settings.config.fan_in_fan_out != stored_transposed:
        warnings.warn(
            f"fan_in_fan_out is set to {settings.config.fan_in_fan_out} but the target module is "
            f"`{type(base).__name__}`. Setting fan_in_fan_out to {stored_transposed}.",
            UserWarning,
            stacklevel=2,
        )
        settings.config.fan_in_fan_out = stored_transposed
    return Linear(
        target, adapter_name, settings, fan_in_fan_out=stored_transposed, spectral_order=spectral_order
    )
