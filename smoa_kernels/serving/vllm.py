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
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter_folder.format import PREFIX
from ..definition.sketch import TOLERANCE
from .factors import MERGE, ServedAdapter, read_served, served_method
from .products import Group, LayerSlots, Slice

__all__ = ["GRAPHS_VARIABLE", "KEEP_VARIABLE", "TESTED_VERSION", "obstacle", "register"]

TESTED_VERSION = "0.32.0"
KEEP_VARIABLE = "SMOA_VLLM_KEEP_W0"
"""0: keep no copy of W0 where vLLM has repacked it, as it does on CPUs."""
GRAPHS_VARIABLE = "SMOA_VLLM_CUDA_GRAPHS"
"""1: CUDA graphs of steps with adapters compute ours too. LoRA's steps then take their time too."""

_log = logging.getLogger("vllm.smoa_kernels")  # vLLM shows messages of loggers below its own


# vLLM's methods, the names of their parameters, and their replacements, which take the original and its arguments.
_hooks: list[tuple[str, str, Callable[..., Any]]] = []
# Replacing it only saves time, on a CPU.
_OPTIONAL = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU.add_lora_logits"


def _instead_of(path: str, parameters: str) -> Callable[..., Callable[..., Any]]:
    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        _hooks.append((path, parameters, function))
        return function

    return note


def _find(path: str) -> tuple[Any, str, Any]:
    """The class of a method, its name, and the method as the class holds it."""
    module, kind, name = path.rsplit(".", 2)
    owner = getattr(import_module(module), kind)
    return owner, name, inspect.getattr_static(owner, name)


def register() -> None:
    """Let this process's vLLM serve SMoA and HiRA adapters, or say why not. vLLM calls it in each of its processes."""
    reason = obstacle()
    if reason is not None:
        tested = f"it was tested with vLLM {TESTED_VERSION}; {MERGE}"
        _log.warning("smoa-kernels serves LoRA alone here, as vLLM does without it: %s; %s", reason, tested)
        return
    for path, parameters, function in _hooks:
        if _difference(path, parameters) is not None:
            continue  # an optional one
        owner, name, found = _find(path)
        original = getattr(found, "__func__", found)  # of a class method
        if not hasattr(original, "is_smoa"):
            method = _wrapped(original, function)
            setattr(owner, name, classmethod(method) if isinstance(found, classmethod) else method)


def _wrapped(original: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(*args: Any, **options: Any) -> Any:
        return function(original, *args, **options)

    method.is_smoa = True  # type: ignore[attr-defined]
    return method


def obstacle() -> str | None:
    """Name the method of vLLM that differs from the version tested; None if none does."""
    needed = ((path, parameters) for path, parameters, _ in _hooks if path != _OPTIONAL)
    return next((found for one in needed if (found := _difference(*one)) is not None), None)


def _difference(path: str, parameters: str) -> str | None:
    try:
        found = _find(path)[2]
    except (ImportError, AttributeError):
        return f"this vLLM has no {path}"
    given = " ".join(inspect.signature(getattr(found, "__func__", found)).parameters)
    return None if given == parameters else f"this vLLM's {path} takes ({given}) and not ({parameters})"


# Loading.


@_instead_of("vllm.lora.peft_helper.PEFTHelper.from_local_dir", "cls lora_path max_position_embeddings")
def _read_configuration(
    original: Callable[..., Any], cls: Any, lora_path: str, *args: Any, **options: Any
) -> Any:
    if served_method(Path(lora_path)) is None:
        return original(cls, lora_path, *args, **options)
    adapter = read_served(Path(lora_path))
    # s is in the factors, so alpha / r is 1; vLLM compares r with --max-lora-rank.
    helper = cls(adapter.rank, adapter.rank, sorted({name.rpartition(".")[2] for name in adapter.layers}))
    helper.smoa_adapter = adapter
    return helper


@_instead_of(
    "vllm.lora.lora_model.LoRAModel.from_local_checkpoint",
    "cls lora_dir expected_lora_modules peft_helper lora_model_id device dtype model_vocab_size weights_mapper "
    "skip_prefixes moe_ep_spec",
)
def _read_weights(original: Callable[..., Any], cls: Any, *args: Any, **options: Any) -> Any:
    given = inspect.signature(original).bind(cls, *args, **options).arguments
    adapter = getattr(given["peft_helper"], "smoa_adapter", None)
    if adapter is None:
        return original(cls, *args, **options)
    tensors, layers = {}, {}
    parse = import_module("vllm.lora.utils").parse_fine_tuned_lora_name
    for name, factors in adapter.layers.items():
        if name.rpartition(".")[2] not in given["expected_lora_modules"]:
            raise ValueError(f"{adapter.folder}: vLLM takes no adapter for {name} of this model; {MERGE}")
        tensors[f"{PREFIX}{name}.lora_A.weight"] = factors.A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = factors.B
        layers[parse(f"{PREFIX}{name}.lora_A.weight", given.get("weights_mapper"))[0]] = factors
    passed = ("device", "dtype", "model_vocab_size", "weights_mapper", "skip_prefixes")
    further = {key: given[key] for key in passed if key in given}
    model = cls.from_lora_tensors(given["lora_model_id"], tensors, given["peft_helper"], **further)
    model.smoa_adapter = replace(adapter, layers=layers)
    return model


@_instead_of("vllm.lora.worker_manager.WorkerLoRAManager._load_adapter", "self lora_request")
def _load_adapter(original: Callable[..., Any], self: Any, lora_request: Any) -> Any:
    model = original(self, lora_request)
    if hasattr(model, "smoa_adapter"):
        _check_fits(model.smoa_adapter, self._adapter_manager)
    return model


def _check_fits(adapter: ServedAdapter, manager: Any) -> None:
    """Raise unless the model has every layer of the adapter, in its shape. Warn if W0 is another weight."""
    left = dict(adapter.layers)
    distances: dict[str, float] = {}
    for name, module in manager.modules.items():
        names = _parts(manager, name)
        parts = {at: left.pop(part) for at, part in enumerate(names) if part in left}
        if not parts:
            continue
        slots = getattr(module, "_smoa_slots", None)
        if not isinstance(slots, LayerSlots) or len(slots.slices) != len(names):
            reason = slots if isinstance(slots, str) else "vLLM packs other layers into one"
            raise ValueError(f"{adapter.folder}: {name} takes LoRA alone: {reason}; {MERGE}")
        base = module.base_layer
        for at, factors in parts.items():
            shape = base.output_sizes[at] if len(names) > 1 else base.output_size, base.input_size
            trained = factors.B.shape[0], factors.A.shape[1]
            if trained != shape:
                raise ValueError(
                    f"{adapter.folder} was trained over another model: its {names[at]} is {trained}, here it is {shape}"
                )
        if module.tp_size == 1:
            sketches = {at: factors.sketch for at, factors in parts.items() if factors.sketch is not None}
            distances |= {names[at]: distance for at, distance in slots.distances(sketches).items()}
    if left and import_module("vllm.distributed").get_pp_group().world_size == 1:
        raise ValueError(
            f"{adapter.folder}: vLLM has no layer {next(iter(left))} that takes adapters; {MERGE}"
        )
    far = [name for name, distance in distances.items() if not distance <= TOLERANCE]
    if far:
        message = f"{adapter.folder} was trained over another base: W0 is another in {', '.join(far[:3])}"
        if adapter.strict_base:
            raise ValueError(message)
        _log.warning("%s (%d of %d layers)", message, len(far), len(distances))


def _parts(manager: Any, name: str) -> list[str]:
    """The adapter's names for the layers that vLLM packs into one."""
    parts: list[str] = manager.packed_modules.get(name, [name])
    return parts


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
    config = import_module("vllm.config").get_current_vllm_config_or_none()
    none = import_module("vllm.config").CUDAGraphMode.NONE
    if (
        config is None
        or config.compilation_config.cudagraph_mode == none
        or os.environ.get(GRAPHS_VARIABLE) == "1"
    ):
        return None
    return f"vLLM records CUDA graphs; give --enforce-eager or set {GRAPHS_VARIABLE}=1"


def _layer_slots(module: Any) -> LayerSlots:
    base, method = module.base_layer, module._get_quant_method()
    ends = list(itertools.accumulate(module.output_slices))
    slices = [
        Slice(*part)
        for part in zip([0, *ends], ends, module.lora_a_stacked, module.lora_b_stacked, strict=False)
    ]
    plain = isinstance(method, import_module("vllm.model_executor.layers.linear").UnquantizedLinearMethod)
    weight = getattr(base, "weight", None) if plain else None
    if weight is not None and tuple(weight.shape) != (ends[-1], slices[0].A.shape[-1]):
        weight = None  # repacked
    keep = plain and os.environ.get(KEEP_VARIABLE, "1") != "0"
    return LayerSlots(lambda rows: method.apply(base, rows, None), slices, weight, keep)


@_instead_of("vllm.lora.model_manager.LoRAModelManager.activate_adapter", "self lora_id")
def _activate_adapter(original: Callable[..., Any], self: Any, lora_id: int) -> Any:
    moved = original(self, lora_id)
    if moved:
        slot = self.lora_index_to_id.index(lora_id)
        adapter = getattr(self.list_adapters()[lora_id], "smoa_adapter", None)
        for name, module in self.modules.items():
            if isinstance(getattr(module, "_smoa_slots", None), LayerSlots):
                ranks = [adapter.ranks(part) for part in _parts(self, name)] if adapter else []
                module._smoa_slots.fill(slot, ranks)
    return moved


@_instead_of("vllm.lora.model_manager.LoRAModelManager._set_adapter_mapping", "self mapping")
def _set_adapter_mapping(original: Callable[..., Any], self: Any, mapping: Any) -> None:
    """Note which tokens of the step are ours, and hide their adapters from vLLM's kernels for LoRA."""
    adapters = self.list_adapters()
    slots = {
        lora_id: slot
        for slot, lora_id in enumerate(self.lora_index_to_id)
        if lora_id in adapters and hasattr(adapters[lora_id], "smoa_adapter")
    }
    slot_of = [slots.get(lora_id, -1) for lora_id in mapping.index_mapping]
    tokens: dict[int, list[int]] = {}
    for token, slot in enumerate(slot_of):
        tokens.setdefault(slot, []).append(token)
    tokens.pop(-1, None)
    groups = [Group.of(slot, torch.tensor(own, device=self.device)) for slot, own in tokens.items()]
    for wrapper in self.punica_wrapper_mapping.values():
        wrapper.smoa_groups = groups
        wrapper.smoa_alone = bool(groups) and all(
            lora_id in slots for lora_id in mapping.index_mapping if lora_id
        )
        wrapper.smoa_has_adapters = any(mapping.index_mapping)
        if not hasattr(wrapper, "smoa_slot_of"):
            wrapper.smoa_slot_of = torch.full_like(wrapper._token_lora_indices, -1)
        wrapper.smoa_slot_of.fill_(-1)[: len(slot_of)].copy_(torch.tensor(slot_of))
    if groups:
        index, prompt = (
            tuple(0 if lora_id in slots else lora_id for lora_id in ids)
            for ids in (mapping.index_mapping, mapping.prompt_mapping)
        )
        mapping = replace(mapping, index_mapping=index, prompt_mapping=prompt)
    original(self, mapping)


# Computing.


@_instead_of("vllm.lora.layers.base_linear.BaseLinearLayerWithLoRA._apply_sync", "self x bias")
def _apply_sync(original: Callable[..., Any], self: Any, x: Tensor, bias: Tensor | None = None) -> Any:
    if torch.compiler.is_compiling() or _is_recorded(x):
        return _adapted(self, x, original(self, x, bias), bias)
    groups = _groups(self)
    if not groups:
        return original(self, x, bias)
    flat = x.flatten(0, -2)
    y = self._smoa_slots.output(flat, bias, groups, lambda: original(self, flat, bias))
    return y.view(*x.shape[:-1], -1)


@_instead_of("vllm.lora.layers.base_linear.BaseLinearLayerWithLoRA._apply_base_forward", "self x")
def _apply_base_forward(original: Callable[..., Any], self: Any, x: Tensor) -> Any:
    bias = None if self.base_layer.skip_bias_add else self.base_layer.bias
    return _adapted(self, x, original(self, x), bias)


def _adapted(layer: Any, x: Tensor, output: Tensor, bias: Tensor | None) -> Tensor:
    if hasattr(layer, "_smoa_name"):
        torch.ops.smoa_serving.adapt(x, output, bias, layer._smoa_name)
    return output


@torch.library.custom_op("smoa_serving::adapt", mutates_args=("output",))
def _adapt(x: Tensor, output: Tensor, bias: Tensor | None, layer: str) -> None:
    """Write our tokens' results into a layer's output. Opaque to compilers, because compiled code serves any step."""
    module, flat = _layers[layer], output.view(-1, output.shape[-1])
    wrapper, slots = module.punica_wrapper, module._smoa_slots
    y = flat
    if not _is_recorded(x):
        y = slots.output(x.flatten(0, -2), bias, _groups(module), lambda: flat)
    elif wrapper.smoa_has_adapters:
        y = slots.recorded_output(x.flatten(0, -2), flat, bias, wrapper.smoa_slot_of[: len(flat)])
    if y is not flat:
        flat.copy_(y)


@_instead_of(_OPTIONAL, "self y x lora_a_stacked lora_b_stacked scale buffer kwargs")
def _add_lora_logits(original: Callable[..., Any], self: Any, *args: Any, **options: Any) -> Any:
    """Skip LoRA's update of the logits in a step without LoRA adapters.

    vLLM would add zeros there, by a product with a matrix that has a row for each word of the vocabulary.
    """
    return None if getattr(self, "smoa_alone", False) else original(self, *args, **options)


def _is_recorded(x: Tensor) -> bool:
    """Whether launches are being recorded in a CUDA graph, for later steps with other adapters."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _groups(layer: Any) -> Sequence[Group]:
    groups: Sequence[Group] = getattr(layer.punica_wrapper, "smoa_groups", ())
    return groups if hasattr(layer, "_smoa_name") else ()
