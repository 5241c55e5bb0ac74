"""The gate that a layer passes before it is timed: its outputs and gradients against its definition in float64.

The definitions share no code with what is timed: ΔW is s·BA for LoRA, W0 ∘ BA for HiRA, and the loop over blocks for
SMoA; y = x (W0 + ΔW)ᵀ and autograd do the rest. An error may be at most twice the one that the same two-GEMM formula
makes in the layer's own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoa_kernels import FusedSMoALinear
from smoa_kernels.definition.dropout import Dropout, draw_seed

from .protocol import DEVICE
from .providers import Case, PaperDense, smoa_delta

NAMES = ("y", "dX", "dA", "dB")


class RedGateError(AssertionError):
    """A provider's results differ from its definition, so it is not timed."""


@dataclass(frozen=True)
class Definition:
    """The computation that a layer stands for.

    Attributes:
        family: layers of one family and case compute the same.
        weight: W0 (N, C).
        factors: A and B, or nothing for a frozen layer.
        delta: ΔW of a weight and the factors.
    """

    family: str
    weight: Tensor
    factors: tuple[Tensor, ...]
    delta: Callable[..., Tensor]


def definition(layer: nn.Module) -> Definition:
    """The definition of one of the providers' layers."""
    if isinstance(layer, PaperDense):
        layer = layer.layer
    if isinstance(layer, FusedSMoALinear):
        ours = layer
        return Definition(
            f"SMoA, {ours.block_order} blocks",
            ours.weight,
            (ours.smoa.A, ours.smoa.B),
            lambda W, A, B: smoa_delta(ours, W, A, B),
        )
    if isinstance(layer, nn.Linear):
        return Definition("frozen", layer.weight, (), torch.zeros_like)
    adapted: Any = layer.get_submodule("0")  # PEFT's layer; its types are not followed
    weight = adapted.get_base_layer().weight
    if hasattr(adapted, "hira_A"):
        factors = (adapted.hira_A["default"], adapted.hira_B["default"])
        return Definition(f"HiRA, {factors[0].dtype}", weight, factors, lambda W, A, B: W * (B @ A))
    factors = (adapted.lora_A["default"].weight, adapted.lora_B["default"].weight)
    scaling = adapted.scaling["default"]
    return Definition("LoRA", weight, factors, lambda W, A, B: scaling * (B @ A))


def check_layers(case: Case, layers: Mapping[str, nn.Module]) -> None:
    """Check every layer of a case.

    Our layers are checked with active dropout, because their mask can be drawn again outside; others with dropout off.

    Raises:
        RedGateError: naming the case, the provider and the tensor.
    """
    exact: dict[tuple[str, bool], list[tuple[Tensor, Tensor]]] = {}
    for name, layer in layers.items():
        meant = definition(layer)
        masked = case.dropout > 0 and isinstance(layer, FusedSMoALinear)
        layer.train(masked)
        if (meant.family, masked) not in exact:
            multiplier = _multiplier(case) if masked else None
            runs = (_defined(case, meant, multiplier, dtype) for dtype in (torch.float64, case.dtype))
            exact[meant.family, masked] = list(zip(*runs, strict=True))
        found = _computed(case, layer, meant)
        for tensor, value, (truth, same_dtype) in zip(
            NAMES, found, exact[meant.family, masked], strict=False
        ):
            check_error(f"{case}: {tensor} of {name}", value, truth, same_dtype)
        layer.train()


def check_error(what: str, value: Tensor, truth: Tensor, same_dtype: Tensor) -> None:
    """Compare a value with the definition's in float64, and its error with the definition's own in its dtype.

    Raises:
        RedGateError: the error is more than twice as large.
    """
    error, budget = (float((v.double() - truth).norm() / truth.norm()) for v in (value, same_dtype))
    if not error <= 2 * budget + 1e-6:
        raise RedGateError(f"{what} errs by {error:.1e}, more than twice the definition's own {budget:.1e}")


def _multiplier(case: Case) -> Tensor:
    torch.manual_seed(4)
    return Dropout(draw_seed(DEVICE), case.dropout).multiplier(case.input().detach())


def _defined(
    case: Case, meant: Definition, multiplier: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    x = case.input().detach().to(dtype).requires_grad_()
    factors = [f.detach().to(dtype).requires_grad_() for f in meant.factors]
    weight = meant.weight.to(dtype)
    y = F.linear(x, weight)
    if factors:
        dropped = x if multiplier is None else x * multiplier.to(dtype)
        y = y + F.linear(dropped, meant.delta(weight, *factors))
    return (y.detach(), *torch.autograd.grad(y, [x, *factors], case.output_gradient().to(dtype)))


def _computed(case: Case, layer: nn.Module, meant: Definition) -> tuple[Tensor, ...]:
    x = case.input()
    torch.manual_seed(4)
    y = layer(x)
    return (y.detach(), *torch.autograd.grad(y, [x, *meant.factors], case.output_gradient()))
