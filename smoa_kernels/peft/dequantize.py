"""Dequantises W0: into a new tensor, or for one product into a buffer that all layers share.

The library that quantised the weight fills a buffer, a panel of rows at a time. Few of its functions write into a given
tensor. The others return a panel, never the whole W0, and it is in cache while it is copied.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.utils.quantization_utils import (
    Bnb4bitBackend,
    Bnb8bitBackend,
    ForwardOnlyQuantizationBackend,
    QuantizationBackend,
    TorchaoBackend,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import FP8Linear

from ..definition.precision import without_autocast

__all__ = ["dequantized", "keep_packing", "quantization_of", "read_weight"]

# Puts rows first..last-1 of W0 into a tensor of their shape.
Reader = Callable[[int, int, Tensor], object]


# Free buffers on the CPU: as many as were in use at once. On GPUs torch's allocator keeps memory.
_FREE: list[Tensor] = []


@contextmanager
def _scratch(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """Lend an uninitialised contiguous tensor; nothing may refer to it after the block.

    A CPU's buffer is kept: a new one of 64 MB comes from the system page by page, which takes as long as filling it.
    Meanwhile a product inside another's block (a recomputation in backward) or in another thread gets a buffer of its
    own.
    """
    size = math.prod(shape) * dtype.itemsize
    try:
        buffer = _FREE.pop() if device.type == "cpu" else None
    except IndexError:
        buffer = None
    with torch.inference_mode(False):  # an inference tensor could not be written outside of that mode
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch.uint8, device=device)
        lent = buffer[:size].view(dtype).view(*shape)
    try:
        yield lent
    finally:
        if device.type == "cpu":
            _FREE.append(buffer)


# torchao raises this, and PEFT passes it on, if a packing has no operator that dequantises it. Then W0 is read as its
# product with the identity.
_LACKS_OPERATOR = NotImplementedError
_SWIZZLED_ROWS = 128  # rows whose scales torchao's NVFP4 stores together
_PANEL_ELEMENTS = {"cpu": 1 << 17, "gpu": 1 << 24}  # fits a core's cache; few launches


class Float8Backend(ForwardOnlyQuantizationBackend):  # type: ignore[misc]  # PEFT's types are not followed
    """transformers' `FP8Linear`: float8 numbers with a scale for each block of them, or one scale for all."""

    def __init__(self) -> None:
        super().__init__("FP8Linear")

    def get_base_weight(self, base_layer: Any) -> Tensor:
        """W0 (N, C) in float32, as `FineGrainedFP8Config(dequantize=True)` loads it before it rounds."""
        weight = torch.empty(base_layer.weight.shape, device=base_layer.weight.device)
        _fill(weight, _float8(base_layer))
        return weight

    def set_base_weight(self, peft_layer: nn.Module, weight_data: Tensor) -> None:
        """Refuse: only the model's loader can choose scales."""
        raise TypeError(
            "an FP8Linear layer takes no merged weight: load the base with FineGrainedFP8Config(dequantize=True) and "
            "merge there"
        )


def quantization_of(base: nn.Module, **kwargs: Any) -> QuantizationBackend | None:
    """Return the back end, PEFT's or ours, that reads the weight of a quantised layer; None for a plain layer.

    Args:
        base: the layer.
        kwargs: as PEFT's `resolve_quantization_backend` takes them.

    Raises:
        ValueError: the layer's weight is of 8 bits or fewer, and nothing here knows how to read it.
    """
    backend = resolve_quantization_backend(base, **kwargs)
    if backend is not None:
        return backend
    weight = base._parameters.get("weight")
    if type(base) is FP8Linear and weight is not None and weight.dtype == torch.float8_e4m3fn:
        return Float8Backend()
    if weight is not None and weight.itemsize < 2:
        raise ValueError(
            f"the weight of {type(base).__name__} is {weight.dtype}, which SMoA reads in FP8Linear of transformers "
            "and in layers of bitsandbytes and torchao: load the model with dequantize=True"
        )
    return None


def read_weight(backend: QuantizationBackend, base: Any) -> Tensor:
    """W0 (N, C) of a quantised layer, newly allocated, as PEFT reads it."""
    try:
        return cast(Tensor, backend.get_base_weight(base))
    except _LACKS_OPERATOR:
        return _identity_product(base.weight, 0, base.weight.shape[1]).T


@contextmanager
def dequantized(backend: QuantizationBackend, base: Any, dtype: torch.dtype) -> Iterator[Tensor]:
    """Give W0 (N, C) in `dtype` within the block; nothing may refer to it afterwards.

    It is filled panel by panel, unless the block is being compiled or the layer is of an unknown kind.
    """
    fill = None if torch.compiler.is_compiling() else _filler(backend, base)
    if fill is None:
        yield read_weight(backend, base).to(dtype)
        return
    with _scratch((base.out_features, base.in_features), dtype, base.weight.device) as buffer:
        # In inference mode torchao's weights cannot be sliced.
        with torch.inference_mode(False), torch.no_grad():
            fill(buffer)
        yield buffer


def _filler(backend: QuantizationBackend, base: Any) -> Callable[[Tensor], None] | None:
    """Choose the function that writes W0 into a buffer (N, C); None for an unknown kind of layer."""
    if isinstance(backend, Bnb4bitBackend):
        return lambda buffer: _fill(buffer, _four_bits(base.weight), base.weight.quant_state.blocksize)
    if isinstance(backend, Bnb8bitBackend):
        return lambda buffer: _fill(buffer, _eight_bits(base))
    if isinstance(backend, TorchaoBackend):
        return lambda buffer: _fill_from_torchao(buffer, base.weight)
    if isinstance(backend, Float8Backend):
        return lambda buffer: _fill(buffer, _float8(base))
    return None


def _fill(buffer: Tensor, read: Reader, block: int = 1, rows: int = 1) -> None:
    """Fill a buffer panel by panel.

    Panels start at multiples of `rows`; one panel holds all if a row is no multiple of the quantisation's `block`.
    """
    height, width = buffer.shape
    elements = _PANEL_ELEMENTS["cpu" if buffer.device.type == "cpu" else "gpu"]
    step = height if width % block else rows * max(1, elements // (rows * width))
    for first in range(0, height, step):
        last = min(first + step, height)
        read(first, last, buffer[first:last])


def _four_bits(weight: Any) -> Reader:
    """bitsandbytes' NF4 and FP4: two numbers per byte, one scale per block of consecutive numbers."""
    state, width = weight.quant_state, weight.quant_state.shape[1]
    scales = state.absmax
    if state.nested:
        functional = importlib.import_module("bitsandbytes.functional")
        scales = functional.dequantize_blockwise(state.absmax, state.state2).add_(state.offset)
    packed, scales = weight.data.view(torch.uint8).flatten(), scales.float()
    operators = torch.ops.bitsandbytes.dequantize_4bit
    writes = _takes_a_buffer(packed.device)

    def read(first: int, last: int, out: Tensor) -> None:
        begin, end = first * width, last * width
        numbers = packed[begin // 2 : -(-end // 2)]
        blocks = scales[begin // state.blocksize : -(-end // state.blocksize)]
        given = (numbers, blocks, state.blocksize, state.quant_type, (last - first, width), state.dtype)
        if writes and out.dtype == state.dtype:
            operators.out(*given, out=out)
        else:
            out.copy_(operators.default(*given))

    return read


def _takes_a_buffer(device: torch.device) -> bool:
    """Whether bitsandbytes' 4-bit dequantisation writes to a given tensor on this kind of device."""
    key = torch._C._dispatch_key_for_device(device.type)
    return torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::dequantize_4bit.out", key)


def _eight_bits(base: Any) -> Reader:
    """bitsandbytes' int8: one scale per row."""
    numbers, scales = base.weight.data, base.state.SCB
    scales = (base.weight.SCB if scales is None else scales).to(numbers.device)
    dequantize = importlib.import_module("bitsandbytes.functional").int8_vectorwise_dequant
    return lambda first, last, out: out.copy_(dequantize(numbers[first:last], scales[first:last]))


def _float8(base: Any) -> Reader:
    """FP8Linear: one scale per block of `block_size` rows and columns; multiplied in float32 and rounded once."""
    weight, scales = base.weight.data, base.weight_scale_inv.data.float()
    height, width = base.block_size or weight.shape
    scales = scales.reshape(-(-weight.shape[0] // height), -1)

    def read(first: int, last: int, out: Tensor) -> None:
        blocks = torch.arange(first, last, device=weight.device) // height
        of_columns = scales[blocks].repeat_interleave(width, dim=1)[:, : weight.shape[1]]
        out.copy_(of_columns.mul_(weight[first:last].float()))

    return read


def _fill_from_torchao(buffer: Tensor, weight: Any) -> None:
    rows = _SWIZZLED_ROWS if getattr(weight, "is_swizzled_scales", False) else 1
    try:
        _fill(buffer, lambda first, last, out: out.copy_(weight[first:last].dequantize()), rows=rows)
    except _LACKS_OPERATOR:
        _fill(buffer.T, lambda first, last, out: out.copy_(_identity_product(weight, first, last)))


def _identity_product(weight: Tensor, first: int, last: int) -> Tensor:
    """Compute columns first..last-1 of W0, as rows: a product with the identity, which is exact.

    torchao's packings for 4-bit kernels can multiply but cannot be dequantised.
    """
    one = torch.zeros(last - first, weight.shape[1], dtype=weight.dtype, device=weight.device)
    one.diagonal(first).fill_(1)
    with without_autocast(weight):
        return F.linear(one, weight)


def keep_packing(base: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for the CPU in the first evaluation.

    `dequantize_4bit` misreads repacked weights, and their scales are rounded to bfloat16.
    """
    if not getattr(base, "support_avx512bf16_for_cpu", False):
        return
    base.support_avx512bf16_for_cpu = False
    weight = base.weight
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        functional = importlib.import_module("bitsandbytes.functional")
        weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu_inverse(
            weight.data, weight.quant_state
        )
