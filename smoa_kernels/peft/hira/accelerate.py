"""`accelerate_hira`: PEFT's own HiRA layers compute through SMoA's operator. HiRA is SMoA with one block and s = 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft.tuners import hira
from peft.tuners.hira.layer import HiraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...checks import check_kind
from .layer import Accelerated, accelerated_class


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
        kind = _class_for(layer)
        if isinstance(kind, str):
            left[name] = kind
            continue
        layer.__class__ = kind
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
        if _is_accelerated(layer):
            layer.give_back()


def _layers(model: nn.Module) -> dict[str, Any]:
    check_kind("model", model, nn.Module)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, HiraLayer)}
    if not layers:
        raise ValueError("the model has no HiRA layers: inject or load an adapter of PEFT's HiraConfig first")
    return layers


def _is_accelerated(layer: nn.Module) -> bool:
    """Whether a layer's class is exactly one of ours: `fully_shard` derives another from it, which has to stay."""
    return "pefts_class" in vars(type(layer))


_OTHERS = {"Embedding": "an embedding is a look-up, not a product"} | dict.fromkeys(
    ("Conv1d", "Conv2d", "Conv3d"), "a convolution is no product with a matrix that SMoA has an operator for"
)


def _class_for(layer: Any) -> type[Accelerated] | str:
    """The accelerated class for a layer, or why there is none."""
    kind: type = layer.pefts_class if _is_accelerated(layer) else type(layer)
    is_quantized = kind.__module__ == "peft.tuners.hira.bnb"
    if kind is not hira.Linear and not is_quantized:
        return _OTHERS.get(kind.__name__, f"its class is {kind.__qualname__}, not PEFT's hira.Linear")
    if "forward" in vars(layer):
        return "its forward was replaced, as accelerate's hooks do"
    base = layer.base_layer
    if not is_quantized:
        if type(base) is not Conv1D and getattr(type(base), "forward", None) is not nn.Linear.forward:
            return f"its base layer {type(base).__qualname__} may compute something else than a product"
        if type(base.weight) not in (Tensor, nn.Parameter):
            return f"its base weight is a {type(base.weight).__qualname__}, not a plain tensor"
    return accelerated_class(kind)
