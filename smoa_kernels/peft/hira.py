"""PEFT's own HiRA layers, computed by SMoA's operator: HiRA is SMoA with one block and s = 1.

    W_eff = W0 ∘ (1 + B A)     hira_B is B (N, r), hira_A is A (r, C)

An accelerated layer is PEFT's layer with another class, a subclass that has another `forward`. It adds no parameter and
no buffer, so state dict, files and everything that PEFT does with them are PEFT's. Where `forward` has no faster way,
it calls PEFT's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from peft.tuners import hira
from peft.tuners.hira.layer import HiraLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers.pytorch_utils import Conv1D

from ..checks import check_kind
from ..definition.arguments import autocast_enabled
from ..definition.packed import scaling_tensor
from ..definition.partition import BlockPartition
from ..functional import smoa_linear

__all__ = ["AcceleratedLinear", "HiraReport", "accelerate_hira", "decelerate_hira"]

_PLAIN_TYPES = (Tensor, nn.Parameter)


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

    Names, state dict, files and optimizer states stay as they are, and so does what PEFT does with them. Layers that
    are added later need another call. No spectrum is computed and no weight copied. :func:`decelerate_hira` undoes it.

    Args:
        model: a model with HiRA adapters; accelerated layers stay so.

    Raises:
        TypeError: `model` is no module.
        ValueError: it has no HiRA layer.

    Example:
        >>> from peft import HiraConfig, get_peft_model
        >>> from smoa_kernels.peft import accelerate_hira
        >>> model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 6))
        >>> model = get_peft_model(model, HiraConfig(r=2, target_modules=["0", "1"]))
        >>> report = accelerate_hira(model)
        >>> report.taken
        ('base_model.model.1',)
        >>> report.left
        {'base_model.model.0': 'an embedding is a look-up, not a product'}
    """
    taken, left = [], {}
    for name, layer in _layers(model).items():
        reason = _obstacle(layer)
        if reason is not None:
            left[name] = reason
            continue
        layer.__class__ = AcceleratedLinear
        layer.make_ready()
        taken.append(name)
    return HiraReport(tuple(taken), left)


def decelerate_hira(model: nn.Module) -> None:
    """Undo :func:`accelerate_hira`: every layer is PEFT's again, and no tensor has changed.

    Args:
        model: a model with HiRA adapters.

    Raises:
        TypeError: `model` is no module.
        ValueError: it has no HiRA layer.

    Example:
        >>> from peft import HiraConfig, get_peft_model
        >>> from smoa_kernels.peft import accelerate_hira
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), HiraConfig(r=2, target_modules=["0"]))
        >>> layer = model.base_model.model[0]
        >>> report = accelerate_hira(model)
        >>> decelerate_hira(model)
        >>> type(layer).__module__
        'peft.tuners.hira.layer'
    """
    for layer in _layers(model).values():
        if type(layer) is AcceleratedLinear:
            layer.__class__ = hira.Linear
            del layer._block


class AcceleratedLinear(hira.Linear):  # type: ignore[misc]  # PEFT's types are not followed
    """PEFT's HiRA layer over an `nn.Linear` or a `Conv1D`, with a forward by SMoA's operator.

    :func:`accelerate_hira` gives a layer this class; none is constructed.
    """

    _block: _OneBlock | None  # None while the weight is on the meta device

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute (..., C) -> (..., N), in x's dtype.

        Args:
            x: floating point, any leading dimensions.
            args, kwargs: passed to the base layer; PEFT's forward computes a call that has any.
        """
        block = self._block
        if block is not None and not (args or kwargs or self.disable_adapters or self.merged):
            names = [name for name in self.active_adapters if name in self.hira_A]
            dropout_p = self._dropout_p(names)
            if names and dropout_p is not None and self._reads_weight(x, block):
                factors = self._factors(names, x)
                if factors is not None:
                    return self._product(x, *factors, block, dropout_p)
        return cast(Tensor, super().forward(x, *args, **kwargs))

    def _reads_weight(self, x: Tensor, block: _OneBlock) -> bool:
        """Whether the base layer's product with x can be computed without calling the base layer."""
        base = self.base_layer
        weight = base.weight
        return (
            not weight.requires_grad
            and weight.device == block.scaling.device == x.device
            and (weight.dtype == x.dtype or autocast_enabled(x))
            # A hook, which is registered on the layer, wants it to be called.
            and not (base._forward_hooks or base._forward_pre_hooks)
            and not (base._backward_hooks or base._backward_pre_hooks)
        )

    def _product(self, x: Tensor, A: Tensor, B: Tensor, block: _OneBlock, dropout_p: float) -> Tensor:
        base, r = self.base_layer, A.shape[0]
        ranks = block.ranks.get(r)  # a sum of several adapters has none
        return smoa_linear(
            x,
            base.weight.T if self.fan_in_fan_out else base.weight,
            base.bias,
            A,
            B,
            block.partition,
            _rank(r, x.device) if ranks is None else ranks,
            scaling=block.scaling,
            dropout_p=dropout_p,
            block_ranks=[r],
        )

    def make_ready(self) -> None:
        """Make what forward needs beside the layer's tensors: now, since forward may be compiled."""
        weight = self.base_layer.weight
        self._block = None
        if weight.is_meta:
            return
        # Kept for later calls, so these are usual tensors, whatever mode this call is made in.
        with torch.inference_mode(False), _disable_current_modes():
            self._block = _one_block(self.out_features, self.in_features, weight.device)
            for r in self.r.values():
                if r not in self._block.ranks:
                    self._block.ranks[r] = _rank(r, weight.device)

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, as PEFT does."""
        super().update_layer(*args, **kwargs)
        self.make_ready()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)
        self.make_ready()
        return self

    def _dropout_p(self, names: Sequence[str]) -> float | None:
        """The probability to drop with; None where PEFT has to: it draws a mask for each adapter."""
        total = 0.0
        for name in names:
            module = self.hira_dropout[name]
            if type(module) is nn.Dropout:
                total += module.p if module.training else 0.0
            elif type(module) is not nn.Identity:
                return None
        return total if total == 0 or (len(names) == 1 and total < 1) else None

    def _factors(self, names: Sequence[str], x: Tensor) -> tuple[Tensor, Tensor] | None:
        """A (r, C) and B (N, r) of the sum of adapters; None where the operator does not take their dtypes."""
        As, Bs = [self.hira_A[name] for name in names], [self.hira_B[name] for name in names]
        dtypes = {factor.dtype for factor in (*As, *Bs)}
        if len(dtypes) > 1 or not dtypes <= {x.dtype, torch.float32}:
            return None
        return (As[0], Bs[0]) if len(names) == 1 else (torch.cat(As), torch.cat(Bs, 1))


class _OneBlock(NamedTuple):
    """What the operator takes beside the tensors that a layer has."""

    partition: BlockPartition
    scaling: Tensor
    ranks: dict[int, Tensor]  # by r: int32 (1,)


@functools.lru_cache(maxsize=256)
def _one_block(out_features: int, in_features: int, device: torch.device) -> _OneBlock:
    """The single block of layers of this shape, which share it."""
    partition = BlockPartition.contiguous((out_features, in_features), 1, device=device)
    return _OneBlock(partition, scaling_tensor(1.0, device), {})


def _rank(r: int, device: torch.device) -> Tensor:
    return torch.full((1,), r, dtype=torch.int32, device=device)


def _layers(model: nn.Module) -> dict[str, HiraLayer]:
    check_kind("model", model, nn.Module)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, HiraLayer)}
    if not layers:
        raise ValueError("the model has no HiRA layers: inject or load an adapter of PEFT's HiraConfig first")
    return layers


_OTHERS = {"Embedding": "an embedding is a look-up, not a product"} | dict.fromkeys(
    ("Conv1d", "Conv2d", "Conv3d"), "a convolution is no product with a matrix that SMoA has an operator for"
)


def _obstacle(layer: HiraLayer) -> str | None:
    """Why a layer cannot be accelerated; None where it can."""
    kind = type(layer)
    if kind not in (hira.Linear, AcceleratedLinear):
        return _OTHERS.get(kind.__name__, f"its class is {kind.__qualname__}, not PEFT's hira.Linear")
    if "forward" in vars(layer):
        return "its forward was replaced, as accelerate's hooks do"
    base = layer.base_layer
    if type(base) is not Conv1D and getattr(type(base), "forward", None) is not nn.Linear.forward:
        return f"its base layer {type(base).__qualname__} may compute something else than a product"
    if type(base.weight) not in _PLAIN_TYPES:
        return f"its base weight is a {type(base.weight).__qualname__}, not a plain tensor"
    return None
