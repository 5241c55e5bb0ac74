"""`ExpertsWeight`: the adapters of one fused weight of experts, and their product with pairs sorted by expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ...backends import resolve_backend
from ...definition.experts import ExpertsAdapter
from ...definition.packed import of_columns
from ...operators.experts import experts_linear
from ..modulated import ParameterLayer


class ExpertsWeight(ParameterLayer):
    """The adapters of one parameter (E, N, C) of a module of experts, or (E, C, N) if it is stored transposed.

    E is the number of experts, N and C are the outputs and inputs of one, and ρ is the largest rank of a block.
    It owns no weight and is no layer of the model: :class:`smoa_kernels.peft.Experts` calls it.

    Args:
        experts: the module that owns the parameter.
        parameter_name: the parameter's name in it.

    Attributes:
        smoa: the adapters of the stack of E weights, by name.
    """

    def __init__(self, experts: nn.Module, parameter_name: str) -> None:
        super().__init__(experts, parameter_name)
        self.fan_in_fan_out = bool(experts.is_transposed)
        self.stack = (self._stored_weight().shape[0],)
        self.out_features, self.in_features = self.base_weight().shape[1:]

    def one_of(self, adapter_names: Sequence[str]) -> str | None:
        """The one of these adapters that this weight has, or None; a ValueError if it has several."""
        found = [name for name in adapter_names if name in self.smoa]
        if len(found) > 1:
            raise ValueError(
                f"{self.parameter_name}: at most one adapter of experts can be active, got {', '.join(found)}"
            )
        return found[0] if found else None

    @property
    def adapting(self) -> str | None:
        """The adapter in the product; None if the product is that with the stored weight.

        Raises:
            ValueError: several adapters of this weight are active (PEFT's function `set_adapter` allows it).
        """
        if self.disable_adapters or self.merged:
            return None
        return self.one_of(cast("list[str]", self.active_adapters))

    def product(self, adapter_name: str, source: Tensor, ends: Tensor) -> Callable[[Tensor], Tensor]:
        """Return a function `y_p = x_p W_effᵀ`: x (P, C) -> y (P, N) in W0's dtype. x is sorted by expert.

        Args:
            adapter_name: of W_eff.
            source: a tensor on x's device, from which x will be computed.
            ends: int32 (E,), how many pairs the experts up to each have together.

        Raises:
            ValueError: the weight is not frozen.
            RuntimeError: x is not on W0's device: W0 is offloaded, or another replica's under `nn.DataParallel`.
        """
        stored = self._stored_weight()
        if stored.requires_grad and stored.is_leaf:  # it would get no gradient
            raise ValueError(
                f"{self.parameter_name} must be frozen where it is adapted, got requires_grad=True; call "
                "requires_grad_(False) on it"
            )
        adapter = self.packed(adapter_name, self.base_weight())
        weight = adapter.weight
        if weight.device != source.device:
            raise RuntimeError(
                f"{self.parameter_name} is on {weight.device} and the experts' input on {source.device}: adapters of "
                "experts take neither offloaded weights nor nn.DataParallel (use DistributedDataParallel)"
            )
        wanted = self.settings[adapter_name].backend
        backend = resolve_backend(wanted, weight.device, weight.dtype, adapter.A.shape[1])
        return lambda x: experts_linear(x.to(weight.dtype), ends, adapter, backend)

    def packed(self, adapter_name: str, weight: Tensor, keep: bool = False) -> ExpertsAdapter:
        """Pair an adapter with W0 (E, N, C); autograd sees the factors."""
        ready = self._ready(adapter_name)
        A, B = of_columns(ready.A, ready.group_size, weight.shape[-1]), ready.B
        if A.dtype not in (weight.dtype, torch.float32):
            A, B = A.to(weight.dtype), B.to(weight.dtype)
        # A copy if a backward may follow: s may be changed before it, as PEFT's `scale_layer` does.
        s = ready.scaling.clone() if torch.is_grad_enabled() else ready.scaling
        return ExpertsAdapter(weight, A, B, ready.partition, ready.ranks, s)
