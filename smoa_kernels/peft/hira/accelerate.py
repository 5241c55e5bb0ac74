"""PEFT's HiRA layers with a forward by SMoA's operator: HiRA is SMoA with one block and s = 1.

    W_eff = W0 ∘ (1 + B A)     hira_B is B (N, r), hira_A is A (r, C)

Of a convolution they are these in the shapes of convolutions; of an embedding hira_embedding_A is Bᵀ, and the other Aᵀ.

An accelerated layer is PEFT's layer with its class replaced by a subclass with another `forward`. It adds no parameter
or buffer, so state dict and files stay PEFT's. Where the operator cannot compute a call, `forward` calls PEFT's.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from peft.tuners import hira
from peft.tuners.hira import layer as hira_layers
from peft.tuners.hira.layer import HiraLayer
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers.pytorch_utils import Conv1D

from ...checks import check_kind
from ...definition.packed import PackedAdapter, scaling_tensor
from ...definition.partition import BlockPartition
from ...definition.precision import autocast_enabled
from ...functional import adapted_linear, embedded_rows, modulated_convolution
from ...layer_checks import has_forward_of, matrix_shape
from ..dequantize import read_weight
from ..quantized import dequantized_linear
from ..replaced import keep_packing

# PEFT's classes, each with the classes whose forward its base layer must have.
_NOT_LINEAR = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding
_KINDS: dict[type, tuple[Any, ...]] = {getattr(hira_layers, kind.__name__): (kind,) for kind in _NOT_LINEAR}
_KINDS[hira.Linear] = nn.Linear, Conv1D
# PEFT looks up what HiRA adds without the base layer's options.
_NO_OPTIONS = SimpleNamespace(padding_idx=None, scale_grad_by_freq=False, sparse=False)


@dataclass(frozen=True)
class HiraReport:
    """Which HiRA layers of a model compute through SMoA's operator.

    Attributes:
        taken: names of the accelerated layers, in the model's order.
        left: names of the layers that compute as PEFT does, each with the reason.
    """

    taken: tuple[str, ...]
    left: dict[str, str]


def accelerate_hira(model: nn.Module) -> HiraReport:
    """Let the HiRA layers of a PEFT model compute through SMoA's operator, with PEFT's own parameters in place.

    Names, state dict, files and optimizer states stay as they are, and PEFT handles them as before. Layers that are
    added later need another call. No spectrum is computed and no weight copied. :func:`decelerate_hira` undoes it.

    Args:
        model: a model with HiRA adapters; accelerated layers stay so.

    Raises:
        TypeError: `model` is no module.
        ValueError: it has no HiRA layer.

    Example:
        >>> from peft import HiraConfig, get_peft_model
        >>> from smoa_kernels.peft import accelerate_hira, decelerate_hira
        >>> model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 6))
        >>> model = get_peft_model(model, HiraConfig(r=2, target_modules=["0", "1"]))
        >>> report = accelerate_hira(model)
        >>> report.taken
        ('base_model.model.0', 'base_model.model.1')
        >>> report.left
        {}
        >>> decelerate_hira(model)
    """
    taken, left = [], {}
    for name, layer in _layers(model).items():
        kind: type = layer.pefts_class if _is_accelerated(layer) else type(layer)
        if (reason := _unsupported_reason(layer, kind)) is not None:
            left[name] = reason
            continue
        layer.__class__ = accelerated_class(kind)
        layer.make_ready()
        taken.append(name)
    return HiraReport(tuple(taken), left)


def decelerate_hira(model: nn.Module) -> None:
    """Undo :func:`accelerate_hira` of a `model`, with the same errors: every layer is PEFT's, no tensor has changed."""
    for layer in _layers(model).values():
        if _is_accelerated(layer):
            if vars(layer).pop("_repacks", False):
                layer.base_layer.support_avx512bf16_for_cpu = True
            vars(layer).pop("_prepared", None)
            layer.__class__ = layer.pefts_class


def _layers(model: nn.Module) -> dict[str, Any]:
    check_kind("model", model, nn.Module)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, HiraLayer)}
    if not layers:
        raise ValueError("the model has no HiRA layers: inject or load an adapter of PEFT's HiraConfig first")
    return layers


def _is_accelerated(layer: nn.Module) -> bool:
    """Whether a layer's class is exactly one of ours: `fully_shard` derives another from it, which has to stay."""
    return "pefts_class" in vars(type(layer))


def _unsupported_reason(layer: Any, kind: type[nn.Module]) -> str | None:
    """Why a layer of one of PEFT's classes cannot be accelerated; None if it can."""
    is_quantized, base = kind.__module__ == "peft.tuners.hira.bnb", layer.base_layer
    if kind not in _KINDS and not is_quantized:
        return f"its class is {kind.__qualname__}, which is none of {', '.join(k.__name__ for k in _KINDS)}"
    if "forward" in vars(layer):
        return "its forward was replaced, as accelerate's hooks do"
    if is_quantized:
        return None
    if not has_forward_of(base, *_KINDS[kind]):
        return f"its base layer {type(base).__qualname__} has a forward of its own"
    if getattr(base, "padding_mode", "zeros") != "zeros":
        return f"PEFT pads what HiRA adds with zeros, its base layer by padding_mode={base.padding_mode!r}"
    if getattr(base, "max_norm", None) is not None:
        return f"its base layer renormalises its weight (max_norm={base.max_norm})"
    if type(base.weight) not in (Tensor, nn.Parameter):
        return f"its base weight is a {type(base.weight).__qualname__}, not a plain tensor"
    return None


@functools.lru_cache(maxsize=256)
def _one_block(out_features: int, in_features: int, device: torch.device) -> tuple[BlockPartition, Tensor]:
    """The single block and the scale 1 of layers of this shape, which share them."""
    partition = BlockPartition.contiguous((out_features, in_features), 1, device=device)
    return partition, scaling_tensor(1.0, device)


def _rank(r: int, device: torch.device) -> Tensor:
    return torch.full((1,), r, dtype=torch.int32, device=device)


_Layer: Any = nn.Module  # Any, since it is mixed into PEFT's layer and has that one's attributes


class Accelerated(_Layer):  # type: ignore[misc]
    """A mixin for PEFT's HiRA classes whose forward uses the operator where that is possible."""

    pefts_class: type[nn.Module]  # which `decelerate_hira` restores
    # Block, s, and the ranks int32 (1,) by r; None while the weight is on the meta device.
    _prepared: tuple[BlockPartition, Tensor, dict[int, Tensor]] | None = None
    _repacks = False  # whether bitsandbytes was to repack the weight for the CPU

    def make_ready(self) -> None:
        """Make the tensors that forward needs beside the layer's own: now, because forward may be compiled."""
        base, self._prepared = self.base_layer, None
        self._repacks = self._repacks or getattr(base, "support_avx512bf16_for_cpu", False)
        keep_packing(base)
        device = base.weight.device
        if device.type == "meta":
            return
        # Kept for later calls, so they must be ordinary tensors even if this call is in inference mode.
        with torch.inference_mode(False), _disable_current_modes():
            block = _one_block(*matrix_shape(base), device)
            self._prepared = *block, {r: _rank(r, device) for r in self.r.values()}

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)
        self.make_ready()
        return self

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute what PEFT's layer does; of a linear one (..., C) -> (..., N), in x's dtype.

        PEFT's forward computes a call that has further arguments, which are the base layer's.
        """
        active = None if args or kwargs else self._active(x)
        if active is None:
            return cast(Tensor, super().forward(x, *args, **kwargs))
        adapter, dropout_p = active
        base = self.base_layer
        if self.pefts_class is hira.Linear:
            return adapted_linear(x, base.bias, adapter, dropout_p=dropout_p)
        if self.pefts_class is hira_layers.Embedding:
            return embedded_rows(x, _NO_OPTIONS, base(x), adapter)
        if self.pefts_class in _KINDS:
            return modulated_convolution(x, base, adapter, "auto")
        read = functools.partial(read_weight, resolve_quantization_backend(base), base)
        return dequantized_linear(x, base, read, adapter, dropout_p=dropout_p)

    def _active(self, x: Tensor) -> tuple[PackedAdapter, float] | None:
        """The sum of the active adapters and its dropout probability; None if PEFT's forward has to compute x."""
        base, names = self.base_layer, [name for name in self.active_adapters if name in self.hira_dropout]
        if self._prepared is None or self.disable_adapters or self.merged or not names:
            return None
        (partition, scaling, ranks), weight = self._prepared, base.weight
        kind, is_embedding = self.pefts_class, self.pefts_class is hira_layers.Embedding
        if is_embedding:
            As, Bs = [self.hira_embedding_B[n].T for n in names], [self.hira_embedding_A[n].T for n in names]
        else:
            As, Bs = [self.hira_A[n].flatten(1) for n in names], [self.hira_B[n].flatten(1) for n in names]
        dropouts, dtypes = [self.hira_dropout[name] for name in names], {f.dtype for f in (*As, *Bs)}
        p = float(sum(drop.p for drop in dropouts if type(drop) is nn.Dropout and drop.training))
        dtype = weight.dtype if is_embedding else x.dtype  # x is an index
        frozen = not weight.requires_grad and (weight.dtype == dtype or autocast_enabled(x))
        most = len(names) if kind not in _KINDS or kind is hira.Linear else 0
        possible = (
            all(type(drop) in (nn.Dropout, nn.Identity) for drop in dropouts)
            # Of several, each draws a mask. PEFT computes convolutions under dropout, and ignores it in embeddings.
            and (p == 0 or is_embedding or (p < 1 and most == 1))
            and (len(dtypes) == 1 and dtypes <= {dtype, torch.float32})
            and weight.device == scaling.device == x.device
            and (frozen or kind not in _KINDS)
            # Hooks on the base layer run only if it is called.
            and not (base._forward_hooks or base._forward_pre_hooks)
            and not (base._backward_hooks or base._backward_pre_hooks)
        )
        if not possible:
            return None
        A, B = (As[0], Bs[0]) if len(names) == 1 else (torch.cat(As), torch.cat(Bs, 1))
        r, W0 = A.shape[0], weight.T if getattr(self, "fan_in_fan_out", False) else weight
        W0 = W0.flatten(1) if kind in _KINDS else W0
        rank = ranks[r] if r in ranks else _rank(r, A.device)  # newly made for a sum of several
        return PackedAdapter(W0, A, B, partition, rank, scaling, [r]), p


@functools.cache
def accelerated_class(kind: type[nn.Module]) -> type[Accelerated]:
    """The class for layers of one of PEFT's HiRA classes: of `peft.tuners.hira.layer`, or over bitsandbytes' layers.

    :func:`accelerate_hira` sets it on an existing layer; it is never constructed.
    """
    return type(
        f"Accelerated{kind.__name__}", (Accelerated, kind), {"pefts_class": kind, "__module__": __name__}
    )


def __getattr__(name: str) -> Any:
    """Find these classes by name, for pickle."""
    plain = name.removeprefix("Accelerated")
    kind = {kind.__name__: kind for kind in _KINDS}.get(plain) or getattr(hira, plain, None)
    if plain == name or not (isinstance(kind, type) and issubclass(kind, HiraLayer)):
        raise AttributeError(name)
    return accelerated_class(kind)
