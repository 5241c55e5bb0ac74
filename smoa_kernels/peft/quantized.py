"""Linear layers over a quantised base (QSMoA): W0 is dequantised for a product and dropped after it.

Forward and backward each dequantise for themselves, so what is kept for backward is x, the factors and the seed,
as over a plain base: never W0's values. bitsandbytes' 4-bit kernels for GPUs write them into a buffer that all layers
share; its kernels for CPUs, its 8-bit layers and torchao take none, so that each of their calls allocates, and frees.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from ..backends import resolve_backend
from ..dropout import draw_seed
from ..functional import smoa_linear
from ..operator import linear_backward
from ..packed import PackedAdapter
from .scratch import ScratchPool

__all__ = ["dequantized", "dequantized_linear", "keep_packing", "read_weight", "requantize"]

Dequantized = AbstractContextManager[Tensor]
_SCRATCH = ScratchPool()


def read_weight(backend: QuantizationBackend, base: Any) -> Tensor:
    """W0 (N, C) of a quantised layer, newly allocated."""
    try:
        return cast(Tensor, backend.get_base_weight(base))
    except NotImplementedError:
        # torchao's packings for 4-bit kernels have no way back. A kernel that multiplies has, and x = 1 rounds nothing.
        weight = base.weight
        one = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        with torch.autocast(weight.device.type, enabled=False):
            return F.linear(one, weight).T


@contextmanager
def dequantized(backend: QuantizationBackend, base: Any) -> Iterator[Tensor]:
    """W0 (N, C) for the length of the block."""
    state = getattr(base.weight, "quant_state", None)
    if state is None or torch.compiler.is_compiling() or not _takes_a_buffer(base.weight.device):
        yield read_weight(backend, base)
        return
    functional = importlib.import_module("bitsandbytes.functional")
    packed = base.weight.data
    with _SCRATCH.borrow(state.shape, state.dtype, packed.device) as buffer:
        yield functional.dequantize_4bit(packed, state, out=buffer)


def _takes_a_buffer(device: torch.device) -> bool:
    """Whether bitsandbytes' 4-bit dequantisation writes to a given tensor on this kind of device."""
    key = torch._C._dispatch_key_for_device(device.type)
    return torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::dequantize_4bit.out", key)


def dequantized_linear(
    x: Tensor,
    weight: Callable[[], Dequantized],
    bias: Tensor | None,
    adapter: PackedAdapter,
    *,
    compute_dtype: torch.dtype | None,
    dropout_p: float,
    algorithm: str,
    backend: str,
) -> Tensor:
    """`y = x W0ᵀ + b + dropout(x) ΔWᵀ`, differentiable in x, the bias and the factors.

    Args:
        x: (..., C).
        weight: gives W0 (N, C) for a while, to forward and backward each.
        bias: (N,) or None.
        adapter: whose `weight` is not looked at.
        compute_dtype: that the product multiplies in; autocast's, or x's, when None.

    Returns:
        (..., N) in x's dtype.
    """
    device = x.device.type
    if (
        compute_dtype is None
        and torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
    ):
        compute_dtype = torch.get_autocast_dtype(device)
    dtype = x.dtype if compute_dtype is None else compute_dtype
    A, B = adapter.A, adapter.B
    if A.dtype not in (dtype, torch.float32):
        A, B = A.to(dtype), B.to(dtype)
    seed = draw_seed(x.device) if dropout_p > 0 else None
    settings = {"dropout_p": dropout_p, "algorithm": algorithm, "backend": backend}
    bias = None if bias is None else bias.to(dtype)
    apply: Any = _DequantizedLinear.apply
    return cast(Tensor, apply(x.to(dtype), bias, A, B, seed, weight, adapter, settings)).to(x.dtype)


class _DequantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        seed: Tensor | None,
        weight: Callable[[], Dequantized],
        adapter: PackedAdapter,
        settings: dict[str, Any],
    ) -> Tensor:
        needs_factors = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        ctx.save_for_backward(x if needs_factors else None, A, B, seed, adapter.ranks, adapter.scaling)
        ctx.weight, ctx.partition, ctx.settings = weight, adapter.partition, settings
        ctx.block_ranks = adapter.block_ranks
        with torch.autocast(x.device.type, enabled=False), weight() as W0:
            return smoa_linear(
                x,
                W0.to(x.dtype),
                bias,
                A,
                B,
                adapter.partition,
                adapter.ranks,
                scaling=adapter.scaling,
                block_ranks=adapter.block_ranks,
                dropout_seed=seed,
                **settings,
            )

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, seed, ranks, scaling = ctx.saved_tensors
        needs_x, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:4]
        with ctx.weight() as W0:
            dx, dA, dB = linear_backward(
                dy,
                x,
                W0.to(dy.dtype),
                A,
                B,
                ranks,
                ctx.block_ranks,
                scaling,
                seed,
                ctx.partition.tensors(),
                ctx.partition.sizes(),
                ctx.settings["dropout_p"],
                0,
                W0.shape[1],
                needs_x,
                resolve_backend(ctx.settings["backend"], dy.device, dy.dtype, A.shape[0]),
            )
        dbias = dy.flatten(0, -2).sum(0) if needs_bias else None
        gradients = (dx if needs_x else None, dbias, dA if needs_A else None, dB if needs_B else None)
        return (*gradients, None, None, None, None)


def keep_packing(base: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for the CPU's own instructions, which evaluation does unasked.

    What it packs so `dequantize_4bit` misreads, and the scales are rounded to bfloat16 on the way.
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


def requantize(layer: Any, weight: Tensor) -> nn.Module:
    """Quantise `weight` into a tuner layer's base layer by PEFT's rules; returns a layer over what was there."""
    base = layer.get_base_layer()
    before, stored = twin(base), getattr(base, "weight", None)
    attributes = dict(vars(stored)) if stored is not None else {}
    layer.quantization_backend.set_base_weight(layer, weight)
    if stored is not None:
        vars(stored).update(attributes)  # PEFT marks the old parameter as not quantised in passing
    return before


def twin(layer: nn.Module) -> nn.Module:
    """A second module over the same quantised tensors, which stays as it is when the first is requantised."""
    other = copy.copy(layer)
    other._parameters = layer._parameters.copy()
    other._buffers = layer._buffers.copy()
    if hasattr(layer, "state"):  # bitsandbytes keeps the scales of 8-bit weights there
        other.state = copy.copy(layer.state)
    return other
