"""`Experts` takes the place of a module of experts whose fused weights have adapters, each an `ExpertsWeight`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.integrations import moe

from ...backends import resolve_backend
from ...definition.experts import ExpertsAdapter
from ...definition.labels import of_columns
from ...operators.experts import experts_linear
from ..modulated import AdaptedModule, ParameterLayer


class Experts(AdaptedModule):
    """A module of experts with adapters of its fused weights; the weights stay the base module's.

    It has a child for each weight that any adapter adapts, named as the parameter. Its forward is that of transformers'
    `grouped_mm_experts_forward`; the base module computes the gate, which differs between classes.

    Args:
        base_layer: a module of a class that transformers decorates with its experts interface.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import OlmoeConfig, OlmoeForCausalLM
        >>> from smoa_kernels.peft import SMoAConfig
        >>> sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
        >>> base = OlmoeForCausalLM(OlmoeConfig(**sizes, num_attention_heads=2, num_experts=4, num_experts_per_tok=2))
        >>> model = get_peft_model(base, SMoAConfig(r=4, target_parameters=["mlp.experts.down_proj"]))
        >>> model.base_model.model.model.layers[0].mlp.experts.down_proj
        smoa.ExpertsWeight(
          experts=4, in_features=8, out_features=16
          (smoa): ModuleDict(
            (default): Adapter(shape=(4, 16, 8), r=4, num_blocks=2)
          )
        )
    """

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute Σ over a token's experts of routing weight · expert(token).

        Args:
            hidden_states: (T, H), T tokens of hidden size H.
            top_k_index: integers (T, top_k), each token's experts.
            top_k_weights: (T, top_k), factors of their outputs.

        Returns:
            (T, H) in the dtype of `hidden_states`.
        """
        self._unmerge_disabled()
        base: Any = self.base_layer
        if all(weight.adapting is None for weight in self.weights.values()):
            return cast(Tensor, base(hidden_states, top_k_index, top_k_weights))
        top_k = top_k_index.shape[-1]
        # Sorted like the base's forward: the bits of an expert's product depend on the order of its rows.
        experts, order = torch.sort(top_k_index.reshape(-1))
        x = hidden_states[order.div(top_k, rounding_mode="floor")]
        numbers = torch.arange(base.num_experts, dtype=experts.dtype, device=experts.device)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        y = self._product("gate_up_proj" if base.has_gate else "up_proj", x, ends, experts)
        y = base._apply_gate(y) if base.has_gate else base.act_fn(y)
        y = self._product("down_proj", y, ends, experts)
        if getattr(base, "has_post_expert_norm", False):
            y = base.post_expert_norm(y)
        # index_copy_ would keep y for backward too; this keeps only the order.
        y = torch.empty_like(y).index_put_((order,), y)
        y = y.view(-1, top_k, y.shape[-1]) * top_k_weights[..., None]
        return y.sum(1).to(hidden_states.dtype)

    def _product(self, name: str, x: Tensor, ends: Tensor, experts: Tensor) -> Tensor:
        """Multiply x by one of the base's weights, adapted or not, and add its bias."""
        base: Any = self.base_layer
        bias = getattr(base, f"{name}_bias")[experts] if base.has_bias else None
        weight = self.weights.get(name)
        if weight is None or (adapter_name := weight.adapting) is None:
            return cast(Tensor, moe._grouped_linear(x, getattr(base, name), ends, bias, base.is_transposed))
        y = cast(Tensor, weight.product(adapter_name, x, ends))
        return y if bias is None else y + bias


class ExpertsWeight(ParameterLayer):
    """The adapters of one parameter (E, N, C) of a module of experts, or (E, C, N) if it is stored transposed.

    E is the number of experts, N and C are an expert's outputs and inputs, and ρ is the largest rank of a block.
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
        """The adapter among these that this weight has, or None; a ValueError if it has several."""
        own = [name for name in adapter_names if name in self.smoa]
        if len(own) > 1:
            raise ValueError(
                f"{self.parameter_name}: at most one adapter of experts can be active, got {', '.join(own)}"
            )
        return own[0] if own else None

    @property
    def adapting(self) -> str | None:
        """The adapter in the product; None if the product is that with the stored weight.

        Raises:
            ValueError: several adapters of this weight are active (PEFT's function `set_adapter` allows it).
        """
        if self.disable_adapters or self.merged:
            return None
        return self.one_of(cast("list[str]", self.active_adapters))

    def product(self, adapter_name: str, x: Tensor, ends: Tensor) -> Tensor:
        """Compute `y_p = x_p W_effᵀ` with an adapter's W_eff: x (P, C), sorted by expert, -> y (P, N) in W0's dtype.

        Args:
            adapter_name: of W_eff.
            x: is cast to W0's dtype.
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
        if weight.device != x.device:
            raise RuntimeError(
                f"{self.parameter_name} is on {weight.device} and the experts' input on {x.device}: adapters of "
                "experts take neither offloaded weights nor nn.DataParallel (use DistributedDataParallel)"
            )
        wanted = self.settings[adapter_name].backend
        backend = resolve_backend(wanted, weight.device, weight.dtype, adapter.A.shape[1])
        return experts_linear(x.to(weight.dtype), ends, adapter, backend)

    def packed(self, adapter_name: str, weight: Tensor, keep: bool = False) -> ExpertsAdapter:
        """Pair an adapter with W0 (E, N, C); autograd sees the factors."""
        ready = self._ready(adapter_name)
        A, B = of_columns(ready.A, ready.group_size, weight.shape[-1]), ready.B
        if A.dtype not in (weight.dtype, torch.float32):
            A, B = A.to(weight.dtype), B.to(weight.dtype)
        # A copy if a backward may follow: s may be changed before it, as PEFT's `scale_layer` does.
        s = ready.scaling.clone() if torch.is_grad_enabled() else ready.scaling
        return ExpertsAdapter(weight, A, B, ready.partition, ready.ranks, s)
