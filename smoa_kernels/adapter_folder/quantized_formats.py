"""The formats of safetensors files whose scales a merge rewrites: a row of `FORMATS` for each quantisation method."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import shown
from ..definition.precision import DTYPES
from .base_model import BaseModel
from .quantized import QuantizedLayer, QuantizedWeight, column_groups, fitting


class Format(NamedTuple):
    """How the safetensors files of a quantisation method hold a layer. Tensors are named by what follows its name.

    Attributes:
        layouts: that are read, the first of them where a configuration names none.
        bits: of a code.
        read: gives the weight, from the layer's tensors and the configuration.
        scales: the tensor that every quantised layer has, and no other layer.
        others: the tensors that it may have.
    """

    layouts: tuple[str, ...]
    bits: tuple[int, ...]
    read: Callable[[Mapping[str, Tensor], Mapping[str, Any]], QuantizedWeight]
    scales: str
    others: tuple[str, ...]


class QuantizedBase:
    """The quantised layers of a base model's folder.

    Args:
        model: the folder's tensors.
        settings: `quantization_config` of its configuration.

    Raises:
        ValueError: the format is not one of `FORMATS`; the message says why.
    """

    def __init__(self, model: BaseModel, settings: Any) -> None:
        self._model, self._settings = model, settings
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        try:
            format = FORMATS.get(str(method))
            refusal = _why_not(method) if format is None else _refusal(format, settings)
        except (AttributeError, KeyError, TypeError) as error:
            format, refusal = None, f"its quantization_config cannot be read: {error!r}"
        if format is None or refusal is not None:
            raise ValueError(
                f"{model.folder} is quantised ({method}): {refusal}. Merge into the model that it was quantised from"
            )
        self._format = format

    def layer(self, name: str) -> QuantizedLayer | None:
        """The layer of this name; None if it is not quantised."""
        format, model = self._format, self._model
        stored = model.stored_name(f"{name}.{format.scales}")
        if stored is None:
            return None
        start = stored.removesuffix(format.scales)
        ends = (end for end in (format.scales, *format.others) if start + end in model.files)
        names = {end: start + end for end in ends}

        def read() -> QuantizedWeight:
            with fitting():
                by_name = model.read_all(names.values())
                tensors = _Tensors({end: by_name[name] for end, name in names.items()})
                weight = format.read(tensors, self._settings)
                if weight.scales.dtype not in DTYPES or weight.groups.max() >= weight.scales.shape[1]:
                    raise ValueError(f"scales are {weight.scales.dtype} {tuple(weight.scales.shape)}")
            return weight

        return QuantizedLayer(names, read)


class _Tensors(dict[str, Tensor]):
    def __missing__(self, end: str) -> Tensor:
        raise ValueError(f"{end} is missing")


def _why_not(name: object) -> str:
    """Why a format is refused."""
    known = {
        "mxfp4": "its scales are powers of two",
        "nvfp4": "its scales have three bits",
        "fp8": "its scales are of rows and columns together, while an adapter's groups are of columns",
    }
    reasons = (reason for key, reason in known.items() if key in str(name).lower())
    return next(reasons, f"the format {shown(name)} is not read")


def _unpack(words: Tensor, bits: int, dim: int, size: int) -> Tensor:
    """The `size` unsigned integers of `bits` bits that int32 words hold along `dim`, the lowest first; float32."""
    if words.dtype != torch.int32 or words.ndim != 2 or words.shape[dim] != -(-size * bits // 32):
        raise ValueError(f"{words.dtype} {tuple(words.shape)} do not hold {size} integers of {bits} bits")
    parts = [(words >> shift & 2**bits - 1).to(torch.uint8) for shift in range(0, 32, bits)]
    return torch.stack(parts, dim + 1).flatten(dim, dim + 1).narrow(dim, 0, size).float()


def _read_packed(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> QuantizedWeight:
    """compressed-tensors, "pack-quantized": integers along rows, zero points along columns."""
    packed, scales = tensors["weight_packed"], tensors["weight_scale"]
    rows, cols = tensors["weight_shape"].tolist()
    groups = column_groups(cols, scales.shape[1], tensors.get("weight_g_idx"))
    possible = {group["weights"]["num_bits"] for group in settings["config_groups"].values()}
    # Layers may differ in their bits; where none fits, unpacking says so.
    bits = next((b for b in possible if packed.shape[1] == -(-cols * b // 32)), min(possible))

    def codes() -> Tensor:
        integers, zeros = _unpack(packed, bits, 1, cols), tensors.get("weight_zero_point")
        if zeros is None:
            return integers.sub_(2 ** (bits - 1))
        return integers.sub_(_unpack(zeros, bits, 0, rows)[:, groups])

    return QuantizedWeight(codes, scales, groups, lambda new: {"weight_scale": new})


def _read_gptq(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> QuantizedWeight:
    """GPTQ: all is (C, N). The first version stores zero points less one. `g_idx` is the group of each column."""
    words, scales, bits, order = tensors["qweight"], tensors["scales"], settings["bits"], tensors.get("g_idx")
    cols, rows = words.shape[0] * 32 // bits if order is None else len(order), words.shape[1]
    groups = column_groups(cols, scales.shape[0], order)
    offset = _layout(settings, "gptq") == "gptq"

    def codes() -> Tensor:
        zeros = _unpack(tensors["qzeros"], bits, 1, rows).add_(offset).remainder_(2**bits)
        return _unpack(words, bits, 0, cols).sub_(zeros[groups]).T

    return QuantizedWeight(codes, scales.T, groups, lambda new: {"scales": new.T})


def _read_awq(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> QuantizedWeight:
    """AWQ, "gemm": all is (C, N), and a word holds rows 0, 2, 4, 6, 1, 3, 5, 7 of eight."""
    words, scales = tensors["qweight"], tensors["scales"]
    cols, rows = words.shape[0], words.shape[1] * 8
    groups = column_groups(cols, scales.shape[0])

    def sorted_rows(packed: Tensor) -> Tensor:
        integers = _unpack(packed, 4, 1, rows).view(len(packed), -1, 8)
        return integers[..., [0, 4, 1, 5, 2, 6, 3, 7]].flatten(1)

    def codes() -> Tensor:
        return sorted_rows(words).sub_(sorted_rows(tensors["qzeros"])[groups]).T

    return QuantizedWeight(codes, scales.T, groups, lambda new: {"scales": new.T})


_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")


def _read_bitsandbytes(tensors: Mapping[str, Tensor], _: Mapping[str, Any]) -> QuantizedWeight:
    """bitsandbytes' NF4 and FP4: a table of 16 numbers, and scales of runs of the flattened weight.

    Nested, scales are a table's numbers times scales of their own, plus an offset; a merge writes them as float32.
    """
    key = next((key for key in _STATES if key in tensors), _STATES[0])
    state = json.loads(tensors[key].numpy().tobytes())
    (rows, cols), size = state["shape"], state["blocksize"]
    if cols % size:
        raise ValueError(f"a row has {cols} columns, no multiple of {size}, so that rows share scales")
    scales, nested = tensors["weight.absmax"], "weight.nested_absmax" in tensors
    written: dict[str, Tensor | None] = {}  # beside the scales
    if nested:
        outer = tensors["weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(scales)]
        scales = tensors["weight.nested_quant_map"][scales.long()] * outer + state["nested_offset"]
        plain = {name: value for name, value in state.items() if not name.startswith("nested_")}
        written = dict.fromkeys(("weight.nested_absmax", "weight.nested_quant_map"))
        written[key] = torch.frombuffer(bytearray(json.dumps(plain), "utf-8"), dtype=torch.uint8)

    def codes() -> Tensor:
        byte = torch.arange(256)
        pairs = tensors["weight.quant_map"].float()[torch.stack([byte >> 4, byte & 15], 1)]
        packed = tensors["weight"].flatten().view(torch.uint8)
        return pairs.index_select(0, packed.int()).view(rows, cols)

    groups = column_groups(cols, cols // size)
    return QuantizedWeight(
        codes, scales.view(rows, -1), groups, lambda new: {"weight.absmax": new.flatten(), **written}
    )


def _layout(settings: Mapping[str, Any], usual: str) -> str:
    """How tensors are laid out, by the names that tools have given to this setting."""
    given = (settings.get(key) for key in ("version", "checkpoint_format", "format"))
    return next((str(name).lower() for name in given if name), usual)


def _schemes(settings: Mapping[str, Any], usual: str) -> list[tuple[object, object]]:
    """The layouts and the bits that a configuration names."""
    if "config_groups" in settings:
        groups = settings["config_groups"].values()
        return [(each.get("format") or settings["format"], each["weights"]["num_bits"]) for each in groups]
    if usual == "bitsandbytes":
        return [(usual, 4 if settings.get("load_in_4bit") or settings.get("_load_in_4bit") else 8)]
    return [("marlin" if settings.get("is_marlin_format") else _layout(settings, usual), settings["bits"])]


def _refusal(format: Format, settings: Mapping[str, Any]) -> str | None:
    """Why a model with this configuration cannot be merged into; None if it can."""
    for layout, bits in _schemes(settings, format.layouts[0]):
        if layout not in format.layouts:
            return _why_not(layout)
        if bits not in format.bits:
            return f"weights of {shown(bits)} bits are not read, only of {' or '.join(map(str, format.bits))}"
    return None


# By `quant_method`.
FORMATS = {
    "compressed-tensors": Format(
        ("pack-quantized",),
        (4, 8),
        _read_packed,
        "weight_scale",
        ("weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx"),
    ),
    "gptq": Format(("gptq", "gptq_v2"), (2, 4, 8), _read_gptq, "scales", ("qweight", "qzeros", "g_idx")),
    "awq": Format(("gemm",), (4,), _read_awq, "scales", ("qweight", "qzeros")),
    "bitsandbytes": Format(
        ("bitsandbytes",),
        (4,),
        _read_bitsandbytes,
        "weight.absmax",
        ("weight", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", *_STATES),
    ),
}
