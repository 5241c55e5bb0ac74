"""Reads the weight W0 of a quantised layer (bitsandbytes, torchao, transformers' FP8 or GPTQ), and its groups."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.utils.quantization_utils import (
    Bnb8bitBackend,
    ForwardOnlyQuantizationBackend,
    QuantizationBackend,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import FP8Linear

from ..adapter import Adapter
from ..checks import MOST_COORDINATES, naming
from ..definition.labels import check_map
from ..definition.precision import without_autocast
from .offload import present

# Weights are read through float32 tensors of a few rows. Those of this many elements fit a core's cache.
_PANEL_ELEMENTS = {"cpu": 1 << 17, "gpu": 1 << 24}


class Float8Backend(ForwardOnlyQuantizationBackend):  # type: ignore[misc]  # PEFT's types are not followed
    """transformers' `FP8Linear`: float8 numbers with a scale for each block of them, or one scale for all."""

    def get_base_weight(self, base_layer: Any) -> Tensor:
        """W0 (N, C) in float32, as `FineGrainedFP8Config(dequantize=True)` loads it before it rounds."""
        return _float8(base_layer, torch.float32)

    def set_base_weight(self, peft_layer: nn.Module, weight_data: Tensor) -> None:
        """Refuse: only the model's loader can choose scales."""
        raise TypeError(
            "an FP8Linear layer takes no merged weight: load the base with FineGrainedFP8Config(dequantize=True) and "
            "merge there"
        )


# gptqmodel's kernels (`QUANT_TYPE`) that keep the checkpoint's packing; others repack it when built or first run.
GPTQ_KERNELS = ("torch", "tritonv2")


class GptqBackend(ForwardOnlyQuantizationBackend):  # type: ignore[misc]
    """A linear layer of gptqmodel, in one of its kernels that keep the checkpoint's packing."""

    def get_base_weight(self, base_layer: Any) -> Tensor:
        """W0 (N, C) in the dtype of its scales."""
        return cast(Tensor, base_layer.dequantize_weight().T)

    def set_base_weight(self, peft_layer: nn.Module, weight_data: Tensor) -> None:
        """Refuse: only the model's folder can be merged into."""
        raise TypeError(
            "a GPTQ layer takes no merged weight: save the adapter, and merge its folder by smoa-kernels merge"
        )


def quantization_of(base: nn.Module, **kwargs: Any) -> QuantizationBackend | None:
    """Return the back end, PEFT's or ours, that reads the weight of a quantised layer; None for a plain layer.

    A ValueError says that nothing here knows how to read a weight of 8 bits or fewer. `kwargs` are those of PEFT's
    `resolve_quantization_backend`.
    """
    packed = next((name for name in ("weight_packed", "qweight") if hasattr(base, name)), None)
    if packed == "qweight" and getattr(base, "QUANT_TYPE", None) in GPTQ_KERNELS:
        if getattr(base, "online_full_had", False) or getattr(base, "online_partial_had", False):
            raise ValueError(
                "the layer rotates its input (online_full_had, online_partial_had), which adapted layers do not: leave "
                "it out (exclude_modules)"
            )
        return GptqBackend("GPTQ")
    backend = None if packed else resolve_quantization_backend(base, **kwargs)
    if backend is not None:
        return backend
    weight = base._parameters.get("weight")
    if type(base) is FP8Linear and weight is not None and weight.dtype == torch.float8_e4m3fn:
        return Float8Backend("FP8Linear")
    if held := packed or (weight is not None and weight.itemsize < 2 and weight.dtype):
        raise ValueError(
            f"the weight of {type(base).__name__} is {held}, which SMoA reads in FP8Linear of transformers and in "
            "layers of bitsandbytes, torchao and gptqmodel (its gptq_torch kernel): load with dequantize=True, or the "
            "model that was quantised"
        )
    return None


def read_weight(backend: QuantizationBackend, base: Any, dtype: torch.dtype | None = None) -> Tensor:
    """W0 (N, C) of a quantised layer, newly allocated, in `dtype`, or as PEFT reads it when None."""
    if isinstance(backend, Bnb8bitBackend):
        return _int8(base, dtype or torch.float32)
    if isinstance(backend, Float8Backend):
        return _float8(base, dtype or torch.float32)
    try:
        weight = cast(Tensor, backend.get_base_weight(base))
    except NotImplementedError:
        return _through_products(base.weight, dtype or base.weight.dtype)
    return weight if dtype is None else weight.to(dtype)


def _int8(base: Any, dtype: torch.dtype) -> Tensor:
    """bitsandbytes' int8: one scale per row."""
    numbers, scales = base.weight.data, base.state.SCB
    scales = (base.weight.SCB if scales is None else scales).to(numbers.device)
    dequantize = importlib.import_module("bitsandbytes.functional").int8_vectorwise_dequant
    out = torch.empty(numbers.shape, dtype=dtype, device=numbers.device)
    return _filled(out, lambda first, last: dequantize(numbers[first:last], scales[first:last]))


def _float8(base: Any, dtype: torch.dtype) -> Tensor:
    """FP8Linear: one scale per block of `block_size` rows and columns; multiplied in float32 and rounded once."""
    weight, scales = base.weight.data, base.weight_scale_inv.data.float()
    height, width = base.block_size or weight.shape
    scales = scales.reshape(-(-weight.shape[0] // height), -1)

    def rows(first: int, last: int) -> Tensor:
        blocks = torch.arange(first, last, device=weight.device) // height
        of_columns = scales[blocks].repeat_interleave(width, dim=1)[:, : weight.shape[1]]
        return cast(Tensor, of_columns.mul_(weight[first:last].float()))

    return _filled(torch.empty(weight.shape, dtype=dtype, device=weight.device), rows)


def _through_products(weight: Any, dtype: torch.dtype) -> Tensor:
    """torchao's packings for 4-bit kernels, which can multiply only; the product with the identity is exact."""

    def columns(first: int, last: int) -> Tensor:
        identity = torch.zeros(last - first, weight.shape[1], dtype=weight.dtype, device=weight.device)
        identity.diagonal(first).fill_(1)
        return F.linear(identity, weight)

    with without_autocast(weight):
        return _filled(torch.empty(weight.shape[::-1], dtype=dtype, device=weight.device), columns).T


def _filled(out: Tensor, rows: Callable[[int, int], Tensor]) -> Tensor:
    """Fill a matrix with the rows first..last-1 that `rows` gives, a few at a time (all where it is compiled)."""
    elements = _PANEL_ELEMENTS["cpu" if out.device.type == "cpu" else "gpu"]
    step = len(out) if torch.compiler.is_compiling() else max(1, elements // out.shape[1])
    for first in range(0, len(out), step):
        last = min(first + step, len(out))
        out[first:last] = rows(first, last)
    return out


def groups_of(model: nn.Module) -> tuple[int, bool]:
    """How many columns of a row share a scale in a quantised model, and whether in act-order, by its configuration.

    Raises:
        ValueError: the model is not quantised so.
    """
    given: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    settings = given.to_dict() if hasattr(given, "to_dict") else dict(given or {})
    method = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method")))
    weights: list[dict[str, Any]] = []
    if method == "bitsandbytes" and settings.get("load_in_4bit"):
        weights = [{"group_size": 64}]
    elif method in ("gptq", "awq"):
        order = settings.get("desc_act") and not settings.get("static_groups")
        weights = [{"group_size": settings.get("group_size"), "actorder": "group" if order else None}]
    elif method == "compressed-tensors":
        weights = [group["weights"] for group in settings.get("config_groups", {}).values()]
        weights = [scheme for scheme in weights if scheme.get("strategy") in ("group", "channel")]
    sizes = {scheme.get("group_size") or -1 for scheme in weights}  # without it a scale for each row
    ordered = sizes != {-1} and any(scheme.get("actorder") in ("group", "dynamic") for scheme in weights)
    if len(sizes) != 1:
        raise ValueError(
            'group_size="base" takes a model whose weights share scales by groups of columns: bitsandbytes (4 bits), '
            f"GPTQ, AWQ or compressed-tensors, got {method} with groups of {sorted(sizes)} columns"
        )
    (size,) = sizes
    return MOST_COORDINATES if size < 1 else size, ordered


def take_groups(
    layers: Mapping[str, Any], adapter_name: str, in_order: bool | None, copied: Sequence[str]
) -> None:
    """Let a new adapter have the groups of columns of the adapters that it copies, or of its base layers.

    Args:
        layers: that hold the adapter, by name.
        adapter_name: of an adapter without blocks.
        in_order: whether the base model is in act-order, which permutes columns; None to leave base layers alone.
        copied: names of adapters.

    Raises:
        ValueError: a layer does not hold the group of each column although the model is in act-order, or they are not
            of the adapter's group size.
    """
    for name, layer in layers.items():
        adapter = layer.smoa[adapter_name]
        with naming(name), present(layer):
            for source in layer.smoa.keys() & copied:
                adapter.set_groups(layer.smoa[source].col_group)
            if in_order is not None:
                adapter.set_groups(_map_of(layer.get_base_layer(), adapter, in_order))


def _map_of(base: Any, adapter: Adapter, in_order: bool) -> Tensor | None:
    """The group of each column of a layer; None where groups are of adjacent columns."""
    maps = [getattr(base, name, None) for name in ("g_idx", "weight_g_idx")]
    given = next((groups for groups in maps if groups is not None and not groups.is_meta), None)
    if given is None and in_order:
        raise ValueError(
            'group_size="base" reads the groups of a model in act-order from its layers, and this one has no g_idx: '
            "load the quantised model with gptqmodel, or leave the layer out (exclude_modules)"
        )
    if given is None or bool((given < 0).any()):  # -1: it was never filled
        return None
    check_map("g_idx", given, adapter.col_block.shape, adapter.group_size)
    return None if bool((given[1:] >= given[:-1]).all()) else cast(Tensor, given)
