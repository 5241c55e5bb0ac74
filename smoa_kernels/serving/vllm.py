"""vLLM's plugin: `vllm serve BASE --enable-lora --lora-modules NAME=FOLDER` takes SMoA and HiRA folders beside LoRA's.

vLLM has no hook for another adapter method, so :func:`register`, its entry point, wraps methods of its LoRA classes,
some of them private. It checks them first: if one differs from the version tested, nothing is wrapped.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter_folder.format import PREFIX
from ..definition.sketch import TOLERANCE
from .factors import MERGE, ServedAdapter, read_served
from .products import LayerSlots, Slice, Step

__all__ = ["GRAPHS_VARIABLE", "KEEP_VARIABLE", "TESTED_VERSION", "obstacle", "register"]

TESTED_VERSION = "0.32.0"
KEEP_VARIABLE = "SMOA_VLLM_KEEP_W0"
"""0: keep no copy of W0 where vLLM has repacked it, as it does on CPUs."""
GRAPHS_VARIABLE = "SMOA_VLLM_CUDA_GRAPHS"
"""1: CUDA graphs of steps with adapters compute ours too. LoRA's steps then take their time too."""

_log = logging.getLogger("vllm.smoa_kernels")  # vLLM shows messages of loggers below its own


# vLLM's methods, the names of their parameters, and their replacements, which take the original and its arguments. The
# first are only called.
_hooks: list[tuple[str, str, Callable[..., Any] | None]] = [
    (
        "vllm.lora.lora_model.LoRAModel.__init__",
        "self lora_model_id rank loras is_3d_lora_weight modules_to_save",
        None,
    ),
    (
        "vllm.lora.lora_weights.LoRALayerWeights.__init__",
        "self module_name rank lora_alpha lora_a lora_b scaling",
        None,
    ),
]


# Replacing it only saves time, on a CPU.
_OPTIONAL = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU.add_lora_logits"


def _instead_of(path: str, parameters: str) -> Callable[..., Callable[..., Any]]:
    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        _hooks.append((path, parameters, function))
        return function

    return note


def _find(path: str) -> tuple[Any, str]:
    """The class of a method, and the method's name."""
    module, kind, name = path.rsplit(".", 2)
    return getattr(import_module(module), kind), name


def register() -> None:
    """Let this process's vLLM serve SMoA and HiRA adapters, or say why not. vLLM calls it in each of its processes."""
    reason = obstacle()
    if reason is not None:
        tested = f"it was tested with vLLM {TESTED_VERSION}; {MERGE}"
        _log.warning("smoa-kernels serves LoRA alone here, as vLLM does without it: %s; %s", reason, tested)
        return
    for path, parameters, function in _hooks:
        if function is None or _difference(path, parameters) is not None:
            continue  # only called, or the optional one
        owner, name = _find(path)
        if not hasattr(getattr(owner, name), "is_smoa"):
            setattr(owner, name, _wrapped(getattr(owner, name), function))


def _wrapped(original: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(*args: Any, **options: Any) -> Any:
        return function(original, *args, **options)

    method.is_smoa = True  # type: ignore[attr-defined]
    return method


def obstacle() -> str | None:
    """Name a method of vLLM that differs from the version tested; None if none does."""
    needed = ((path, parameters) for path, parameters, _ in _hooks if path != _OPTIONAL)
    return next((found for one in needed if (found := _difference(*one)) is not None), None)


def _difference(path: str, parameters: str) -> str | None:
    try:
        found = getattr(*_find(path))
    except (ImportError, AttributeError):
        return f"this vLLM has no {path}"
    given = " ".join(inspect.signature(found).parameters)
    return None if given == parameters else f"this vLLM's {path} takes ({given}) and not ({parameters})"


# Loading.


@_instead_of("vllm.lora.worker_manager.WorkerLoRAManager._load_adapter", "self lora_request")
def _load_adapter(original: Callable[..., Any], self: Any, lora_request: Any) -> Any:
    utils, manager = import_module("vllm.lora.utils"), self._adapter_manager
    try:
        folder = Path(utils.get_adapter_absolute_path(lora_request.lora_path))
    except FileNotFoundError:
        return original(self, lora_request)  # which reports the error
    adapter = read_served(folder)
    if adapter is None:
        return original(self, lora_request)
    most = self.lora_config.max_lora_rank
    if adapter.rank > most:
        raise ValueError(f"{adapter.folder}: rank {adapter.rank} is greater than max_lora_rank {most}")
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    mapper = None if mapper is None else mapper.get_rename_mapper()
    layers = {
        utils.parse_fine_tuned_lora_name(f"{PREFIX}{name}.lora_A.weight", mapper)[0]: factors
        for name, factors in adapter.layers.items()
    }
    _check_fits(replace(adapter, layers=layers), manager)
    weights, dtype = import_module("vllm.lora.lora_weights").LoRALayerWeights, self.lora_config.lora_dtype
    loras = {
        # s is in B, so alpha / r is 1.
        name: weights(name, 1, 1, factors.A.to(dtype), factors.B.to(dtype))
        for name, factors in layers.items()
    }
    model = self._lora_model_cls(lora_request.lora_int_id, adapter.rank, loras)
    model.smoa_ranks = {name: factors.ranks for name, factors in layers.items()}
    return model


def _check_fits(adapter: ServedAdapter, manager: Any) -> None:
    """Raise unless the model has every layer of the adapter, in its shape. Warn if W0 is another weight."""
    left, kinds, far, compared = dict(adapter.layers), set[str](), list[str](), 0
    for name, module in manager.modules.items():
        names = manager.packed_modules.get(name, [name])
        kinds.update(part.rpartition(".")[2] for part in names)
        parts = {at: left.pop(part) for at, part in enumerate(names) if part in left}
        if not parts:
            continue
        slots, base = getattr(module, "_smoa_slots", None), module.base_layer
        if not isinstance(slots, LayerSlots) or len(slots.slices) != len(names):
            reason = slots if isinstance(slots, str) else "vLLM packs other layers into one"
            raise ValueError(f"{adapter.folder}: {name} takes LoRA alone: {reason}; {MERGE}")
        for at, factors in parts.items():
            shape = base.output_sizes[at] if len(names) > 1 else base.output_size, base.input_size
            trained = factors.B.shape[0], factors.A.shape[1]
            if trained != shape:
                raise ValueError(
                    f"{adapter.folder} was trained over another model: its {names[at]} is {trained}, here it is {shape}"
                )
        sketches = {at: factors.sketch for at, factors in parts.items() if factors.sketch is not None}
        if sketches and module.tp_size == 1:  # a sketch is of all of W0, and a shard has only a part
            products = slots.sign_products()
            compared += len(sketches)
            distances = {at: slots.slices[at].distance(sketch, products) for at, sketch in sketches.items()}
            far += [names[at] for at, distance in distances.items() if not distance <= TOLERANCE]
    # Under pipeline parallelism another process may have a layer, but not a kind of layers that this one lacks.
    alone = import_module("vllm.distributed").get_pp_group().world_size == 1
    for name in left:
        if alone or name.rpartition(".")[2] not in kinds:
            raise ValueError(f"{adapter.folder}: vLLM has no layer {name} that takes adapters; {MERGE}")
    if far:
        message = f"{adapter.folder} was trained over another base: W0 is another in {', '.join(far[:3])}"
        if adapter.strict_base:
            raise ValueError(message)
        _log.warning("%s (%d of %d layers)", message, len(far), compared)


# Slots.


@_instead_of("vllm.lora.model_manager.LoRAModelManager.register_module", "self module_name module")
def _register_module(original: Callable[..., Any], self: Any, module_name: str, module: Any) -> None:
    original(self, module_name, module)
    module._smoa_slots = _hindrance(module) or _layer_slots(module)
    if isinstance(module._smoa_slots, LayerSlots):
        module._smoa_name = f"{module_name} {len(_layers)}"
        _layers[module._smoa_name] = module


# Layers by their names in compiled graphs.
_layers: dict[str, Any] = {}


def _hindrance(module: Any) -> str | None:
    """Why a layer can compute only LoRA; None if it takes our adapters too."""
    if not isinstance(module, import_module("vllm.lora.layers.base_linear").BaseLinearLayerWithLoRA):
        return f"{type(module).__name__} is no linear layer"
    if module._enable_aux_cuda_stream:
        return "VLLM_LORA_ENABLE_DUAL_STREAM is set"
    if module.lora_config.fully_sharded_loras:
        return "--fully-sharded-loras is given"
    config = import_module("vllm.config")
    current = config.get_current_vllm_config_or_none()
    graphs = current and current.compilation_config.cudagraph_mode != config.CUDAGraphMode.NONE
    if graphs and os.environ.get(GRAPHS_VARIABLE) != "1":
        return f"vLLM records CUDA graphs; give --enforce-eager or set {GRAPHS_VARIABLE}=1"
    return None


def _layer_slots(module: Any) -> LayerSlots:
    base, method = module.base_layer, module._get_quant_method()
    ends = list(itertools.accumulate(module.output_slices))

    def product(x: Tensor) -> Any:
        return method.apply(base, x, None)

    slices = [
        Slice(*part, product)
        for part in zip([0, *ends], ends, module.lora_a_stacked, module.lora_b_stacked, strict=False)
    ]
    plain = isinstance(method, import_module("vllm.model_executor.layers.linear").UnquantizedLinearMethod)
    weight = getattr(base, "weight", None) if plain else None
    if weight is not None and tuple(weight.shape) != (ends[-1], slices[0].A.shape[-1]):
        weight = None  # repacked
    keep = plain and os.environ.get(KEEP_VARIABLE, "1") != "0"
    return LayerSlots(slices, weight, keep)


@_instead_of("vllm.lora.model_manager.LoRAModelManager.activate_adapter", "self lora_id")
def _activate_adapter(original: Callable[..., Any], self: Any, lora_id: int) -> Any:
    moved = original(self, lora_id)
    if moved:
        slot = self.lora_index_to_id.index(lora_id)
        ranks = getattr(self.list_adapters()[lora_id], "smoa_ranks", {})
        for name, module in self.modules.items():
            if isinstance(getattr(module, "_smoa_slots", None), LayerSlots):
                module._smoa_slots.fill(
                    slot, [ranks.get(part, ()) for part in self.packed_modules.get(name, [name])]
                )
    return moved


@_instead_of("vllm.lora.model_manager.LoRAModelManager._set_adapter_mapping", "self mapping")
def _set_adapter_mapping(original: Callable[..., Any], self: Any, mapping: Any) -> None:
    """Note which tokens of the step are ours, and hide their adapters from vLLM's kernels for LoRA."""
    adapters = self.list_adapters()
    ours = {
        lora_id: slot
        for slot, lora_id in enumerate(self.lora_index_to_id)
        if hasattr(adapters.get(lora_id), "smoa_ranks")
    }
    slots = torch.tensor([ours.get(lora_id, -1) for lora_id in mapping.index_mapping], dtype=torch.long)
    groups = {
        slot: (slots == slot).nonzero().flatten().to(self.device)
        for slot in slots.unique().tolist()
        if slot >= 0
    }
    for wrapper in self.punica_wrapper_mapping.values():
        if not hasattr(wrapper, "smoa_slots"):  # always the same memory, because CUDA graphs read it
            wrapper.smoa_slots = torch.full_like(wrapper._token_lora_indices, -1)
        wrapper.smoa_slots.fill_(-1)[: len(slots)].copy_(slots)
        wrapper.smoa_step = Step(groups, wrapper.smoa_slots)
        wrapper.smoa_has_adapters = any(mapping.index_mapping)
    if groups:
        hidden = {
            name: tuple(0 if lora_id in ours else lora_id for lora_id in getattr(mapping, name))
            for name in ("index_mapping", "prompt_mapping")
        }
        mapping = replace(mapping, **hidden)
    original(self, mapping)


# Computing.


@_instead_of("vllm.lora.layers.base_linear.BaseLinearLayerWithLoRA._apply_sync", "self x bias")
def _apply_sync(original: Callable[..., Any], self: Any, x: Tensor, bias: Tensor | None = None) -> Any:
    if torch.compiler.is_compiling() or not hasattr(self, "_smoa_name"):
        return _adapted(self, x, original(self, x, bias), bias)
    flat = x.flatten(0, -2)
    return _output(self, flat, bias, lambda: original(self, flat, bias)).view(*x.shape[:-1], -1)


@_instead_of("vllm.lora.layers.base_linear.BaseLinearLayerWithLoRA._apply_base_forward", "self x")
def _apply_base_forward(original: Callable[..., Any], self: Any, x: Tensor) -> Any:
    bias = None if self.base_layer.skip_bias_add else self.base_layer.bias
    return _adapted(self, x, original(self, x), bias)


def _output(layer: Any, x: Tensor, bias: Tensor | None, base: Callable[[], Tensor]) -> Any:
    """A layer's output (T, N) in this step; `base` gives vLLM's."""
    step = getattr(layer.punica_wrapper, "smoa_step", None)
    recorded = _is_recorded(x)
    if step is None or not (layer.punica_wrapper.smoa_has_adapters if recorded else step.groups):
        return base()
    return layer._smoa_slots.output(x, bias, step, base, recorded=recorded)


def _adapted(layer: Any, x: Tensor, output: Tensor, bias: Tensor | None) -> Tensor:
    if hasattr(layer, "_smoa_name"):
        torch.ops.smoa_serving.adapt(x, output, bias, layer._smoa_name)
    return output


@torch.library.custom_op("smoa_serving::adapt", mutates_args=("output",))
def _adapt(x: Tensor, output: Tensor, bias: Tensor | None, layer: str) -> None:
    """Write our tokens' results into a layer's output. Opaque to compilers, because compiled code serves any step."""
    flat = output.view(-1, output.shape[-1])
    y = _output(_layers[layer], x.flatten(0, -2), bias, lambda: flat)
    if y is not flat:
        flat.copy_(y)


@_instead_of(_OPTIONAL, "self y x lora_a_stacked lora_b_stacked scale buffer kwargs")
def _add_lora_logits(original: Callable[..., Any], self: Any, *args: Any, **options: Any) -> Any:
    """Skip LoRA's update of the logits if no token has a LoRA adapter.

    vLLM would add zeros there, by a product with a matrix that has a row for each word of the vocabulary.
    """
    return original(self, *args, **options) if (self.sampler_indices >= 0).any() else None


def _is_recorded(x: Tensor) -> bool:
    """Whether launches are being recorded in a CUDA graph, for later steps with other adapters."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
