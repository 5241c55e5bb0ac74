"""`Experts`: takes the place of a module of experts whose fused weights have adapters (docs/experts.md)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers.integrations import moe

from ..modulated import AdaptedModule

_Product = Callable[[Tensor], Tensor]
_Prepare = Callable[[Tensor, Tensor], _Product]


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
        weights = self.weights
        self._unmerge_disabled()
        base: Any = self.base_layer
        adapted: dict[str, _Prepare] = {}
        for name, weight in weights.items():
            adapter_name = weight.adapting
            if adapter_name is not None:
                adapted[name] = partial(weight.product, adapter_name)
        if not adapted:
            return cast(Tensor, base(hidden_states, top_k_index, top_k_weights))
        top_k = top_k_index.shape[-1]
        # Sorted like the base's forward: the bits of an expert's product depend on the order of its rows.
        experts, order = torch.sort(top_k_index.reshape(-1))
        x = hidden_states[order.div(top_k, rounding_mode="floor")]
        numbers = torch.arange(base.num_experts, dtype=experts.dtype, device=experts.device)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        # Both products are prepared before either runs: W0 passes through the caches and evicts the data that preparing
        # needs, which would then be loaded twice per token.
        first = "gate_up_proj" if base.has_gate else "up_proj"
        up = self._product(first, adapted.get(first), hidden_states, ends, experts)
        down = self._product("down_proj", adapted.get("down_proj"), hidden_states, ends, experts)
        y = down(base._apply_gate(up(x)) if base.has_gate else base.act_fn(up(x)))
        if getattr(base, "has_post_expert_norm", False):
            y = base.post_expert_norm(y)
        # index_copy_ would keep y for backward too; this keeps only the order.
        y = torch.empty_like(y).index_put_((order,), y)
        y = y.view(-1, top_k, y.shape[-1]) * top_k_weights[..., None]
        return y.sum(1).to(hidden_states.dtype)

    def _product(
        self, name: str, adapted: _Prepare | None, source: Tensor, ends: Tensor, experts: Tensor
    ) -> _Product:
        """Return a function that multiplies by one of the base's weights, adapted or not, and adds its bias."""
        base: Any = self.base_layer
        product = None if adapted is None else adapted(source, ends)

        def with_bias(x: Tensor) -> Tensor:
            bias = getattr(base, f"{name}_bias")[experts] if base.has_bias else None
            if product is None:
                plain = getattr(base, name)
                return cast(Tensor, moe._grouped_linear(x, plain, ends, bias, base.is_transposed))
            y = product(x)
            return y if bias is None else y + bias

        return with_bias
