"""`SMoAModel`, PEFT's tuner for SMoA: injects the layers into a model and manages all of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, get_quantization_kwargs
from peft.utils.other import AuxiliaryTrainingWrapper, _get_submodules
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ..adapter_folder.settings import AdapterSettings
from ..checks import naming
from ..definition.packed import PackedAdapter
from ..distributed import smoa_buffers
from .base_weight import tied_layers, untie
from .combine import check_combination, check_one_map, combined_config
from .config import SMoAConfig
from .dequantize import groups_of, quantization_of, take_groups
from .experts.experts import Experts, ExpertsWeight
from .experts.targets import find_targets
from .folder.loading import PARAMETER_PREFIX, Snapshot, check_adapter, name_groups
from .layer import SMoALayer, keys_of, layers_with
from .linear import Linear
from .modulated import AdaptedModule, Attention, Convolution, Embedding, ParameterLayer
from .offload import present
from .replaced import keep_packing
from .sorting import initialize_all

# What adapts a layer of each class, or of one derived from it.
_KINDS: dict[type[nn.Module], Any] = {
    nn.Linear: Linear,
    Conv1D: Linear,
    nn.Conv1d: Convolution,
    nn.Conv2d: Convolution,
    nn.Conv3d: Convolution,
    nn.Embedding: Embedding,
    nn.MultiheadAttention: Attention,
}


class SMoAModel(BaseTuner):  # type: ignore[misc]  # PEFT's types are not followed
    """A model with SMoA adapters, as `peft.get_peft_model(model, SMoAConfig(...))` wraps it.

    Args:
        model: the model to adapt, changed in place.
        config: the first adapter's configuration.
        adapter_name: its name.
        low_cpu_mem_usage: leave the adapter on the meta device, to be loaded.

    Example:
        >>> from peft import get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), SMoAConfig(r=4, target_modules=["0"]))
        >>> type(model.base_model).__name__, type(model.base_model.model[0]).__name__
        ('SMoAModel', 'Linear')
    """

    prefix: str = PARAMETER_PREFIX
    tuner_layer_cls = SMoALayer
    _experts: Sequence[str] = ()  # the fused weights that the last injection adapts
    snapshots: dict[str, Snapshot]  # of the model before each adapter whose weights are not loaded yet
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        self.snapshots = {}  # first, because PEFT's constructor injects
        if hasattr(model, "peft_config"):  # PEFT would write into the configurations of another tuner
            self.peft_config = dict(model.peft_config)
        super().__init__(model, *args, **kwargs)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Names of the buffers that DistributedDataParallel need not broadcast.

        It reads this attribute of the module that it wraps; a `PeftModel` forwards that to this model.
        """
        ignored = getattr(self.model, "_ddp_params_and_buffers_to_ignore", ())
        names = [f"model.{name}" for name in (*ignored, *smoa_buffers(self.model))]
        return [*names, *(f"base_model.{name}" for name in names)]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's: put an adapter into a model. If that fails, the model is as before.

        Raises:
            TypeError, ValueError: `adapter_name` cannot name a folder, or the configuration does not fit the model.
        """
        is_new = not layers_with(model, adapter_name)
        config = self.peft_config[adapter_name]
        before = Snapshot(model, config)
        in_order: bool | None = None
        if config.group_size == "base":
            self.peft_config[adapter_name] = config = copy(config)
            config.group_size, in_order = groups_of(model)
        try:
            if not isinstance(adapter_name, str) or not adapter_name or set(adapter_name) & set("./\\"):
                # The name is part of the parameters' names, and of the folder that the adapter is saved in.
                raise ValueError(f"adapter_name must be a name without dots or slashes, got {adapter_name!r}")
            self._experts, excluded = find_targets(model, config)
            with warnings.catch_warnings():
                # PEFT checks only two of the patterns, against names of modules but not of parameters.
                warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys", RuntimeWarning)
                if excluded:
                    warnings.filterwarnings("ignore", "You have passed exclude_modules", UserWarning)
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            injected = layers_with(model, adapter_name, every_name=False)
            # A new adapter computes its blocks and draws its factors now; an adapter from a file or for inference
            # waits for them. TRL adds a frozen copy ("ref") under the configuration of the adapter that it copies: it
            # takes the blocks of that adapter now, and TRL copies the factors.
            copied = [n for n, held in self.peft_config.items() if held is config and n != adapter_name]
            take_groups(injected, adapter_name, in_order, copied)
            if copied or not (config.is_from_file or config.inference_mode):
                adapters = {name: layer.smoa[adapter_name] for name, layer in injected.items()}
                # On the meta device weights will be loaded. PEFT may leave factors there alone.
                fresh = [
                    n for n, a in adapters.items() if not (a.A.is_meta or a.ranks.is_meta or a.has_blocks)
                ]
                initialize_all({name: injected[name] for name in fresh}, adapter_name)
            plain = Linear, ExpertsWeight
            others = sorted(name for name, layer in injected.items() if not isinstance(layer, plain)) or None
            if not config.is_from_file and others != config.not_linear:
                if not config.inference_mode:  # what is handed over in loading stays that object
                    self.peft_config[adapter_name] = config = copy(config)
                config.not_linear = others
            if config.use_lora_rate:
                settings = {name: layer.settings[adapter_name] for name, layer in injected.items()}
                self.peft_config[adapter_name] = config.with_alphas_of(settings)
        except BaseException:  # Ctrl-C too: sorting a large model takes minutes
            if is_new:
                before.restore(adapter_name)
            raise
        if config.is_from_file and is_new:
            self.snapshots[adapter_name] = before  # kept until the weights were checked
        for pattern, keys in config.unmatched_patterns(list(injected)).items():
            warnings.warn(
                f"The following {pattern} keys did not match any targeted module and were ignored: {keys}.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _prepare_adapter_config(self, peft_config: SMoAConfig, model_config: dict[str, Any]) -> SMoAConfig:
        """As PEFT's: choose modules by the architecture, but choose none if `target_parameters` is given."""
        if peft_config.target_modules is None and peft_config.target_parameters:
            return peft_config
        return cast(SMoAConfig, super()._prepare_adapter_config(peft_config, model_config))

    def _inject_parameters(
        self, peft_config: SMoAConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Put an adapter into the fused weights of experts, and `Experts` around the modules that own them."""
        for key in self._experts:
            module_name, _, parameter_name = key.rpartition(".")
            parent, module, name = _get_submodules(model, module_name)
            if not isinstance(module, Experts):
                module = Experts(module)
                setattr(parent, name, module)
            if parameter_name not in module.weights:
                module.add_module(parameter_name, ExpertsWeight(module.base_layer, parameter_name))
            with naming(key), init_empty_weights() if low_cpu_mem_usage else nullcontext():
                module.weights[parameter_name].update_layer(adapter_name, peft_config.for_layer(key))
        return list(self._experts)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's: set the active adapters.

        Raises:
            ValueError: several of them adapt the same experts. Nothing has changed.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for layer in self.model.modules():
            if isinstance(layer, ExpertsWeight):
                layer.one_of(names)
        super().set_adapter(adapter_name, inference_mode)

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
        # It has the parameter's name, which only target_parameters adapts.
        if isinstance(target, ExpertsWeight):
            return
        settings = peft_config.for_layer(current_key)
        with naming(current_key):
            base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            if isinstance(parent, nn.MultiheadAttention) and isinstance(
                base, NonDynamicallyQuantizableLinear
            ):
                raise ValueError(
                    "nn.MultiheadAttention reads the weight of its out_proj and never calls it: name the attention in "
                    "target_modules, which adapts all of its weights, and leave out_proj out by exclude_modules"
                )
            if isinstance(target, SMoALayer):
                target.update_layer(adapter_name, settings)
                return
            new_module = self._new_layer(target, adapter_name, settings)
            if isinstance(new_module, Attention):  # a file names its weights, as the patterns therefore do
                new_module.update_layer(
                    adapter_name, lambda name: peft_config.for_layer(f"{current_key}.{name}")
                )
        self._replace_module(parent, target_name, new_module, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # The adapter is already on the layer's device; PEFT would move it to an offloaded weight's meta device.
        setattr(parent, child_name, new_module)

    def _new_layer(self, target: nn.Module, adapter_name: str, settings: AdapterSettings) -> nn.Module:
        if isinstance(target, Attention):
            return target
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        quantization = quantization_of(base, **get_quantization_kwargs(self.model))
        keep_packing(base)
        of_quantized = None if quantization is None else Linear
        kind = next((ours for plain, ours in _KINDS.items() if isinstance(base, plain)), of_quantized)
        if kind is None:
            supported = ", ".join(f"`{kind.__module__}.{kind.__name__}`" for kind in _KINDS)
            raise ValueError(
                f"Target module {target} is not supported. Currently, only the following modules are supported: "
                f"{supported} and quantised linear layers."
            )
        if kind is not Linear and quantization is not None:
            raise ValueError(
                f"a quantised {type(base).__name__} cannot be adapted: of quantised layers only linear ones are; "
                "exclude_modules leaves it out"
            )
        if kind is Attention:
            return Attention(cast(nn.MultiheadAttention, target))
        if kind is not Linear:
            return cast(nn.Module, kind(target, adapter_name, settings))
        stored_transposed = isinstance(base, Conv1D)
        if settings.fan_in_fan_out != stored_transposed:
            warnings.warn(
                f"fan_in_fan_out is set to {settings.fan_in_fan_out} but the target module is "
                f"`{type(base).__name__}`. Setting fan_in_fan_out to {stored_transposed}.",
                UserWarning,
                stacklevel=2,
            )
            settings.fan_in_fan_out = stored_transposed
        return Linear(target, adapter_name, settings, quantization=quantization)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Pass `adapter_names` of a forward or generate call to every layer: one adapter for each sample."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if any(isinstance(module, AdaptedModule) for module in self.modules()):
            raise ValueError(
                "adapter_names cannot be given where experts are adapted, or an nn.MultiheadAttention: a batch takes "
                "one adapter"
            )
        unknown = set(adapter_names) - {*self.peft_config, "__base__"}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        generation = kwargs.get("generation_config") or getattr(self.model, "generation_config", None)
        counts = ("num_beams", "num_return_sequences")
        repeats = max(kwargs.get(count) or getattr(generation, count, None) or 1 for count in counts)

        def name_samples(module: nn.Module, args: Any, given: dict[str, Any]) -> Any:
            # generate() repeats each sample, in a decoder but not in an encoder.
            rows = len(next(iter((*args, *given.values()))))
            times = repeats if rows == repeats * len(adapter_names) else 1
            return args, {**given, "adapter_names": [name for name in adapter_names for _ in range(times)]}

        named = [m for m in self.modules() if isinstance(m, (SMoALayer, AuxiliaryTrainingWrapper))]
        handles = [module.register_forward_pre_hook(name_samples, with_kwargs=True) for module in named]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "cat",
    ) -> None:
        """Add an adapter that combines others; it is neither active nor trained until it is set.

        Args:
            adapters: names of the adapters to combine.
            weights: a factor for each.
            adapter_name: the new adapter's name.
            combination_type: "cat" gives `ΔW = Σ w_i ΔW_i` exactly and adds the ranks up, block by block (a layer whose
                adapters have different blocks gets a single block). "linear" sums the factors, at their common rank.

        Raises:
            ValueError: a name is unknown or taken, the number of weights is another, the combination is unknown, an
                adapter trains biases or further modules, or, for "linear", blocks or ranks differ. Nothing is added.
        """
        combine = check_combination(self.peft_config, adapters, weights, adapter_name, combination_type)
        combined: dict[str, PackedAdapter] = {}
        for name, layer in self.model.named_modules():
            if isinstance(layer, SMoALayer):
                given = [(a, w) for a, w in zip(adapters, weights, strict=True) if a in layer.smoa]
                if given and isinstance(layer, ParameterLayer):
                    raise ValueError(f"adapters of nn.MultiheadAttention cannot be combined: {given[0][0]!r}")
                if given:
                    check_one_map(name, [layer.smoa[a].col_group for a, _ in given])
                    with present(layer):
                        parts = [layer.packed(a, torch.empty(0)) for a, _ in given]  # W0 is not used
                        combined[name] = combine(parts, [float(w) for _, w in given])
        self.peft_config[adapter_name] = combined_config(self.peft_config[adapters[0]], combined)
        self.inject_adapter(self.model, adapter_name)
        for name, adapter in combined.items():
            layer = self.model.get_submodule(name)
            layer.fill(adapter_name, adapter, next(a for a in adapters if a in layer.smoa))
        self.peft_config[adapter_name].format_version = None

    def merge_adapter(self, adapter_names: list[str] | None = None, *args: Any, **kwargs: Any) -> None:
        """As PEFT's: merge adapters into the base weights.

        Raises:
            ValueError: another module holds an adapted weight, and would compute with W_eff too. Nothing is merged.
        """
        chosen = self.active_adapters if adapter_names is None else adapter_names
        for name, layer in tied_layers(self.model).items():
            if any(adapter in layer.smoa for adapter in chosen):
                raise ValueError(
                    f"{name}: the adapted weight is tied to another module's, which would compute with the merged one: "
                    "merge_and_unload() unties them"
                )
        super().merge_adapter(adapter_names, *args, **kwargs)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        """Give adapted weights that other modules share, as a head that is tied to the embedding, memory of their own.

        PEFT then sets `tie_word_embeddings` to False; alone it would write W_eff into the embedding too.
        """
        for layer in tied_layers(self.model).values() if merge else ():
            untie(layer)
        return cast(nn.Module, super()._unload_and_optionally_merge(merge, *args, **kwargs))

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> Any:
        layers = layers_with(model, adapter_name)
        for layer in layers.values():
            if not layer.smoa[adapter_name].A.is_meta:
                layer.partition(adapter_name)  # computes missing blocks, into the state dict's tensors
        held = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, **kwargs)
        for name, layer in layers.items():
            # PEFT looks for a checkpointed layer's tensors by the name of torch's wrapper, which state dicts leave out.
            keys = keys_of(name.replace("_checkpoint_wrapped_module.", ""), adapter_name)
            held.update((key, state_dict[key]) for key in keys.values() if key in state_dict)
            # As with LoRA, a folder holds the configuration's scale, whatever `set_scale` says.
            if (key := keys["scaling"]) in held:
                s, scale = layer.smoa[adapter_name].scaling, layer.settings[adapter_name].scaling
                held[key] = torch.full_like(s, scale)
        return held

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SMoAConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> Any:
        state_dict = name_groups(model, adapter_name, state_dict)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        tuners = [module for module in model.modules() if isinstance(module, SMoAModel)]
        snapshots = [tuner.snapshots.pop(adapter_name, None) for tuner in tuners]
        layers = layers_with(model, adapter_name).values()
        try:
            check_adapter(model, adapter_name, remapped, strict_base=config.strict_base)
        except ValueError:
            if not all(layer.smoa[adapter_name].has_blocks for layer in layers):
                for before in filter(None, snapshots):  # this call also injected the adapter
                    before.restore(adapter_name)
            raise
        return remapped
