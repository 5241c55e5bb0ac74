"""vLLM's plugin: `vllm serve BASE --enable-lora --lora-modules NAME=FOLDER` takes SMoA and HiRA folders beside LoRA's.

vLLM has no hook for another adapter method, so :func:`register`, its entry point, wraps methods of its LoRA classes,
some of them private (`_METHODS`). It checks them first: if any differs from the known versions', nothing is wrapped.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter_folder.format import PREFIX
from ..definition.sketch import check_base, distance_by_products
from .factors import MERGE, Labels, LayerFactors, read_served
from .products import LayerSlots, Step

__all__ = ["GRAPHS_VARIABLE", "KEEP_VARIABLE", "VERSIONS", "register", "reload", "unsupported_reason"]

VERSIONS = ("0.32.0", "0.33.0")  # the second was compared by its signatures, and not run
KEEP_VARIABLE = "SMOA_VLLM_KEEP_W0"
"""0: keep no copy of W0 where vLLM has repacked it, as it does on CPUs."""
GRAPHS_VARIABLE = "SMOA_VLLM_CUDA_GRAPHS"
"""1: CUDA graphs of steps with adapters compute ours too. LoRA's steps then take their time too."""

_log = logging.getLogger("vllm.smoa_kernels")  # vLLM shows messages of loggers below its own


@functools.cache
def register() -> None:
    """Let this process's vLLM serve SMoA and HiRA adapters, or say why not. vLLM calls it in each of its processes."""
    if (reason := unsupported_reason()) is not None:
        known = f"it knows vLLM {' and '.join(VERSIONS)}; {MERGE}"
        _log.warning("smoa-kernels serves LoRA alone here, as vLLM does without it: %s; %s", reason, known)
        return
    for path, (_, replacement) in _METHODS.items():
        if replacement is not None:
            owner, name = _find(path)
            setattr(owner, name, _wrapped(getattr(owner, name), replacement))


def _find(path: str) -> tuple[Any, str]:
    """The class of a method, and the method's name."""
    module, kind, name = path.rsplit(".", 2)
    return getattr(import_module(f"vllm.lora.{module}"), kind), name


def _wrapped(original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(*args: Any, **options: Any) -> Any:
        return replacement(original, *args, **options)

    return method


def unsupported_reason() -> str | None:
    """Name a method of vLLM that differs from the known versions'; None if none does."""
    for path, (parameters, _) in _METHODS.items():
        try:
            method = getattr(*_find(path))
        except (ImportError, AttributeError):
            return f"this vLLM has no vllm.lora.{path}"
        given = " ".join(inspect.signature(method).parameters)
        if given != parameters:
            return f"this vLLM's vllm.lora.{path} takes ({given}) and not ({parameters})"
    return None


def reload(llm: Any, folder: str | os.PathLike[str], name: str = "policy", number: int = 1) -> Any:
    """Load a folder into a running `vllm.LLM`, in place of the adapter with this number, if there is one.

    Returns the `LoRARequest` for `llm.generate(..., lora_request=...)`. If vLLM refuses the adapter, its error is
    raised and the adapter that was loaded before stays. No request may be under way.
    """
    request = import_module("vllm.lora.request").LoRARequest
    llm.llm_engine.add_lora(request(name, number, str(folder), load_inplace=True))
    llm.reset_prefix_cache()  # its keys are names and folders
    return request(name, number, str(folder))


# Replacements of vLLM's methods; each takes the original and its arguments. Loading:


def _load_adapter(original: Callable[..., Any], self: Any, lora_request: Any) -> Any:
    utils, manager = import_module("vllm.lora.utils"), self._adapter_manager
    try:
        folder = Path(utils.get_adapter_absolute_path(lora_request.lora_path))
    except FileNotFoundError:
        return original(self, lora_request)  # which reports the error
    if (adapter := read_served(folder)) is None:
        return original(self, lora_request)
    most = self.lora_config.max_lora_rank
    if adapter.rank > most:
        raise ValueError(f"{folder}: rank {adapter.rank} is greater than max_lora_rank {most}")
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    tensors = {
        f"{PREFIX}{name}.lora_{side}.weight": factor
        for name, factors in adapter.layers.items()
        for side, factor in (("A", factors.A), ("B", factors.B))
    }
    # s is in B, so alpha / r is 1.
    settings = {"r": adapter.rank, "lora_alpha": adapter.rank, "target_modules": []}
    model = self._lora_model_cls.from_lora_tensors(
        lora_request.lora_int_id,
        tensors,
        import_module("vllm.lora.peft_helper").PEFTHelper.from_dict(settings),
        device="cpu",
        dtype=self.lora_config.lora_dtype,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
    )
    layers = dict(zip(model.loras, adapter.layers.values(), strict=True))  # by vLLM's names
    check_base(_distances(folder, layers, manager), strict=adapter.strict_base, warn=_log.warning)
    model.smoa_labels = {name: factors.labels for name, factors in layers.items()}
    return model


def _distances(folder: Path, layers: Mapping[str, LayerFactors], manager: Any) -> dict[str, float]:
    """The distances of W0 from an adapter's sketches, by layer. Raises unless the model takes every layer."""
    modules = {name: manager.packed_modules.get(name, [name]) for name in manager.modules}
    places = {part: (name, at) for name, parts in modules.items() for at, part in enumerate(parts)}
    # Under pipeline parallelism another process may have a layer, but not a kind of layers that is missing here.
    alone = import_module("vllm.distributed").get_pp_group().world_size == 1
    kinds = {part.rpartition(".")[2] for part in places}
    # The slices of a layer share its products. A device may have no memory for those of all layers.
    products, distances = functools.lru_cache(maxsize=4)(LayerSlots.sign_products), {}
    for part, factors in layers.items():
        if part not in places:
            if alone or part.rpartition(".")[2] not in kinds:
                raise ValueError(f"{folder}: vLLM has no layer {part} that takes adapters; {MERGE}")
            continue
        name, at = places[part]
        slots, module, count = manager.modules[name]._smoa_slots, manager.modules[name], len(modules[name])
        if not isinstance(slots, LayerSlots) or len(slots.slices) != count:
            reason = slots if isinstance(slots, str) else "vLLM packs other layers into one"
            raise ValueError(f"{folder}: {name} takes LoRA alone: {reason}; {MERGE}")
        base, trained = module.base_layer, (factors.B.shape[0], factors.A.shape[1])
        shape = base.output_sizes[at] if count > 1 else base.output_size, base.input_size
        if trained != shape:
            raise ValueError(
                f"{folder} was trained on another model: its {part} is {trained}, here it is {shape}"
            )
        # A sketch is of all of W0, and a shard has only a part.
        if factors.sketch is not None and module.tp_size == 1:
            own = products(slots)[:, slots.slices[at].rows]
            distances[f"{part} of {folder}"] = distance_by_products(own, factors.sketch)
    return distances


# Slots:


def _create_lora_modules(original: Callable[..., Any], self: Any) -> None:
    """On a CPU, add an empty slot: tokens without LoRA have slot -1, which vLLM's operators there take for the last."""
    most = self.lora_config.max_loras
    self.lora_config.max_loras += import_module("vllm.platforms").current_platform.is_cpu()
    try:
        original(self)
    finally:
        self.lora_config.max_loras = most


def _register_module(original: Callable[..., Any], self: Any, module_name: str, module: Any) -> None:
    original(self, module_name, module)
    config = import_module("vllm.config").get_current_vllm_config().compilation_config
    module._smoa_slots = _lora_only_reason(module, config) or _layer_slots(module)
    # vLLM's table of the layers that compiled graphs name is this engine's, and is emptied with it.
    module._smoa_name = f"{module_name}.smoa"
    config.static_forward_context[module._smoa_name] = module


def _lora_only_reason(module: Any, config: Any) -> str | None:
    """Why a layer can compute only LoRA; None if it takes our adapters too."""
    if not isinstance(module, import_module("vllm.lora.layers.base_linear").BaseLinearLayerWithLoRA):
        return f"{type(module).__name__} is no linear layer"
    if module._enable_aux_cuda_stream:
        return "VLLM_LORA_ENABLE_DUAL_STREAM is set"
    if module.lora_config.fully_sharded_loras:
        return "--fully-sharded-loras is given"
    if config.cudagraph_mode.name != "NONE" and os.environ.get(GRAPHS_VARIABLE) != "1":
        return f"vLLM records CUDA graphs; give --enforce-eager or set {GRAPHS_VARIABLE}=1"
    return None


def _layer_slots(module: Any) -> LayerSlots:
    base, method = module.base_layer, module._get_quant_method()
    plain = isinstance(method, import_module("vllm.model_executor.layers.linear").UnquantizedLinearMethod)
    return LayerSlots(
        module.lora_a_stacked,
        module.lora_b_stacked,
        lambda x: method.apply(base, x, None),
        getattr(base, "weight", None) if plain else None,
        keep=plain and os.environ.get(KEEP_VARIABLE, "1") != "0",
    )


def _activate_adapter(original: Callable[..., Any], self: Any, lora_id: int) -> Any:
    if moved := original(self, lora_id):
        self._last_mapping = None  # another kind of adapter may have come under the same id
        slot = self.lora_index_to_id.index(lora_id)
        labels = getattr(self.list_adapters()[lora_id], "smoa_labels", {})
        for name, module in self.modules.items():
            parts = [labels.get(part) for part in self.packed_modules.get(name, [name])]
            # Of a layer that vLLM cuts into more slices than parts, no adapter of ours was taken.
            for own, part in zip(
                getattr(module._smoa_slots, "slices", ()), _cut(module, parts), strict=False
            ):
                own.fill(slot, part)
    return moved


def _cut(module: Any, parts: list[Labels | None]) -> list[Labels | None]:
    """The labels of this process's part of a layer, whose factors vLLM cuts with the same methods."""
    if module.tp_size == 1 or not any(parts):
        return parts
    sides = []
    for side, cut in (("rows", module.slice_lora_b), ("cols", module.slice_lora_a)):
        given = [part and getattr(part, side) for part in parts]
        sides.append(cut(given) if len(given) > 1 else [cut(*given)])
    return [part and Labels(rows, cols, part.ranks) for part, rows, cols in zip(parts, *sides, strict=True)]


def _set_adapter_mapping(original: Callable[..., Any], self: Any, mapping: Any) -> None:
    """Note which tokens of the step are ours, and hide their adapters from vLLM's kernels for LoRA."""
    adapters, slots = self.list_adapters(), enumerate(self.lora_index_to_id)
    ours = {lora_id: slot for slot, lora_id in slots if hasattr(adapters.get(lora_id), "smoa_labels")}
    wrappers = self.punica_wrapper_mapping.values()
    if not hasattr(self, "_smoa_memory"):  # the same for all steps, because CUDA graphs read it
        indices = [wrapper._token_lora_indices for wrapper in wrappers]
        self._smoa_memory = torch.empty_like(max(indices, key=len))
    of_tokens = torch.tensor([ours.get(lora_id, -1) for lora_id in mapping.index_mapping])
    step = Step.of(of_tokens, self._smoa_memory)
    for wrapper in wrappers:
        wrapper.smoa_step = step if any(mapping.index_mapping) else None
    both = mapping.index_mapping, mapping.prompt_mapping
    tokens, prompts = (tuple(0 if lora_id in ours else lora_id for lora_id in ids) for ids in both)
    original(self, replace(mapping, index_mapping=tokens, prompt_mapping=prompts))


# Computing:


def _apply(original: Callable[..., Any], self: Any, x: Tensor, *given: Tensor | None) -> Any:
    """A linear layer's output; `given` is its bias, if vLLM's method takes that."""
    if not isinstance(getattr(self, "_smoa_slots", None), LayerSlots):
        return original(self, x, *given)
    (bias,) = given or (None if self.base_layer.skip_bias_add else self.base_layer.bias,)
    if torch.compiler.is_compiling():
        output = original(self, x, *given)
        torch.ops.smoa_serving.adapt(x, output, bias, self._smoa_name)
        return output
    flat = x.flatten(0, -2)
    base = functools.cache(lambda: original(self, flat, *given))
    y = _output(self, flat, bias, base)
    # Where vLLM's method takes no bias, its output may have a dtype of its own, which stays.
    return (y if given else y.to(base().dtype)).view(*x.shape[:-1], -1)


@torch.library.custom_op("smoa_serving::adapt", mutates_args=("output",))
def _adapt(x: Tensor, output: Tensor, bias: Tensor | None, layer: str) -> None:
    """Write our tokens' results into a layer's output. Opaque to compilers, because compiled code serves any step."""
    flat = output.view(-1, output.shape[-1])
    layers = import_module("vllm.forward_context").get_forward_context().no_compile_layers
    flat.copy_(_output(layers[layer], x.flatten(0, -2), bias, lambda: flat))


def _output(layer: Any, x: Tensor, bias: Tensor | None, base: Callable[[], Tensor]) -> Tensor:
    """A layer's output (T, N) in this step; `base` gives vLLM's."""
    slots: LayerSlots = layer._smoa_slots
    if (step := getattr(layer.punica_wrapper, "smoa_step", None)) is None:  # no token has an adapter
        return base()
    if _is_recorded(x):
        return slots.recorded(x, base(), bias, step.slots[: len(x)])
    return slots.output(x, bias, step, base)


def _is_recorded(x: Tensor) -> bool:
    """Whether launches are being recorded in a CUDA graph, for later steps with other adapters."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _add_lora_logits(original: Callable[..., Any], self: Any, *args: Any, **options: Any) -> Any:
    """Skip LoRA's update of the logits if no token has a LoRA adapter.

    vLLM would add zeros there, by a product with a matrix that has a row for each word of the vocabulary.
    """
    return original(self, *args, **options) if (self.sampler_indices >= 0).any() else None


# The methods in `vllm.lora` that we use: the names of their parameters, and what replaces them. The others are called.
_METHODS: dict[str, tuple[str, Callable[..., Any] | None]] = {
    "worker_manager.WorkerLoRAManager._load_adapter": ("self lora_request", _load_adapter),
    "peft_helper.PEFTHelper.from_dict": ("config_dict", None),
    "lora_model.LoRAModel.from_lora_tensors": (
        "lora_model_id tensors peft_helper device dtype model_vocab_size weights_mapper skip_prefixes",
        None,
    ),
    "model_manager.LoRAModelManager._create_lora_modules": ("self", _create_lora_modules),
    "model_manager.LoRAModelManager.register_module": ("self module_name module", _register_module),
    "model_manager.LoRAModelManager.activate_adapter": ("self lora_id", _activate_adapter),
    "model_manager.LoRAModelManager._set_adapter_mapping": ("self mapping", _set_adapter_mapping),
    "layers.base_linear.BaseLinearLayerWithLoRA._apply_sync": ("self x bias", _apply),
    "layers.base_linear.BaseLinearLayerWithLoRA._apply_base_forward": ("self x", _apply),
    "punica_wrapper.punica_cpu.PunicaWrapperCPU.add_lora_logits": (
        "self y x lora_a_stacked lora_b_stacked scale buffer kwargs",
        _add_lora_logits,
    ),
}
