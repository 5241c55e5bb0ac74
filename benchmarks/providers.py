"""The layers that are compared: the real peers from PEFT, the paper's dense way, and ours.

Every provider is a module over the same frozen weight, so that its outputs can be checked before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import peft
import torch
from torch import Tensor, nn

from smoa_kernels import FusedSMoALinear
from smoa_kernels.reference import reference_linear


@dataclass(frozen=True)
class Case:
    """One problem: T tokens through an (N, C) layer with rank budget r in K blocks."""

    tokens: int
    out_features: int
    in_features: int
    num_blocks: int
    rank: int
    dtype: torch.dtype = torch.float32
    dropout: float = 0.0

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        dropout = f" dropout={self.dropout}" if self.dropout else ""
        return (
            f"T={self.tokens} {self.out_features}x{self.in_features} K={self.num_blocks} r={self.rank} "
            f"{dtype}{dropout}"
        )

    def smoke(self) -> Case:
        """The same at a size that takes a moment."""
        return replace(self, tokens=min(self.tokens, 24), out_features=96, in_features=80)

    def base(self) -> nn.Linear:
        """The frozen layer: seeded, so that every provider gets equal values."""
        torch.manual_seed(0)
        base = nn.Linear(self.in_features, self.out_features, bias=False, dtype=self.dtype)
        return base.requires_grad_(False)

    def input(self) -> Tensor:
        """x (T, C) that wants a gradient, as inside a network."""
        torch.manual_seed(1)
        return torch.randn(self.tokens, self.in_features, dtype=self.dtype).requires_grad_()


def frozen(case: Case) -> nn.Module:
    """The base layer alone."""
    return case.base()


def lora(case: Case) -> nn.Module:
    """PEFT's LoRA at the same rank."""
    config = peft.LoraConfig(r=case.rank, target_modules=["0"], lora_dropout=case.dropout)
    return _inject(case, config)


def hira(case: Case) -> nn.Module:
    """PEFT's HiRA at the same rank."""
    config = peft.HiraConfig(r=case.rank, target_modules=["0"], hira_dropout=case.dropout)
    return _inject(case, config)


def _inject(case: Case, config: peft.PeftConfig) -> nn.Module:
    model = peft.inject_adapter_in_model(config, nn.Sequential(case.base()))
    # PEFT keeps the adapter in float32 unless told; the same dtype is what ours are compared in.
    model.to(case.dtype)
    _fill(model, "_B")
    return model


class PaperDense(nn.Module):
    """The paper's way: a dense ΔW assembled block by block, a second full GEMM, plain autograd."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.layer = _fused(case, "auto")

    def forward(self, x: Tensor) -> Tensor:
        """y (T, N)."""
        layer = self.layer
        return reference_linear(
            x,
            layer.weight,
            layer.bias,
            layer.smoa_A,
            layer.smoa_B,
            layer.partition,
            layer.smoa_ranks,
            scaling=layer.smoa_scaling,
        )


def smoa(algorithm: str = "auto", backend: str = "auto") -> Callable[[Case], FusedSMoALinear]:
    """Provider of `FusedSMoALinear` with a forced algorithm and backend."""
    return lambda case: _fused(case, algorithm, backend)


def _fused(case: Case, algorithm: str, backend: str = "auto") -> FusedSMoALinear:
    layer = FusedSMoALinear.from_linear(
        case.base(),
        r=case.rank,
        num_blocks=case.num_blocks,
        dropout=case.dropout,
        algorithm=algorithm,
        backend=backend,
    )
    _fill(layer, "smoa_B")
    return layer


def _fill(model: nn.Module, suffix: str) -> None:
    """A nonzero B: an adapter that does nothing cannot be checked."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and suffix in name:
                parameter.normal_(std=0.05)


def check(case: Case, layer: FusedSMoALinear) -> None:
    """The gate: outputs and gradients against float64 truth, within twice the same-dtype reference's error."""
    if case.dropout:
        layer = _fused(
            replace(case, dropout=0.0), layer.algorithm if layer.algorithm != "merged" else "split"
        )
    x = case.input()
    dy = torch.randn_like(layer(x))
    truth = _run(layer, x, dy, torch.float64)
    for name, ours, same_dtype, exact in zip(
        ("y", "dx", "dA", "dB"), _run(layer, x, dy, None), _run(layer, x, dy, x.dtype), truth, strict=True
    ):
        error, budget = ((value.double() - exact).norm() / exact.norm() for value in (ours, same_dtype))
        if not error <= 2 * budget + 1e-6:
            raise AssertionError(f"{case}: {name} errs by {error:.1e}, twice the reference's {budget:.1e}")


def _run(layer: FusedSMoALinear, x: Tensor, dy: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """y, dX, dA, dB of the layer itself (dtype None) or of the definition computed in a dtype."""
    cast = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, layer.smoa_A, layer.smoa_B)]
    weight = layer.weight.to(dtype or x.dtype)
    if dtype is None:
        y = layer(cast[0])
        cast[1:] = [layer.smoa_A, layer.smoa_B]
    else:
        y = reference_linear(
            cast[0], weight, None, *cast[1:], layer.partition, layer.smoa_ranks, scaling=layer.scaling
        )
    return (y.detach(), *torch.autograd.grad(y, cast, dy.to(y.dtype)))
