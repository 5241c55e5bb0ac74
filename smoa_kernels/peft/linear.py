"""`Linear`: a linear layer with SMoA adapters; its forward, and how adapters are merged and unmerged."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..adapter_folder.settings import AdapterSettings
from ..functional import adapted_linear, cast_factors
from ..layer_checks import over_rows
from ..operators.dispatch import parameter
from .layer import AdaptedLayer
from .offload import present
from .quantized import dequantized_linear


class Linear(AdaptedLayer):
    """Linear layer `y = x W0ᵀ + b + Σ dropout(x) ΔWᵀ` over its active adapters; W0 and b stay the base layer's.

    This is SMoA (arXiv 2605.21147), equation (3) of docs/definition.md, for any number of adapters. x has C inputs and
    y N outputs.

    Args:
        base_layer: `nn.Linear` or transformers' `Conv1D`, a quantised linear layer, or another tuner's layer around
            one.
        adapter_name: the first adapter's name.
        settings: the first adapter's settings.
        quantization: PEFT's back end for the base layer, where that is quantised.

    Example:
        >>> from peft import get_peft_model
        >>> from smoa_kernels.peft import SMoAConfig
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), SMoAConfig(r=4, target_modules=["0"]))
        >>> model.base_model.model[0].get_delta_weight("default").shape
        torch.Size([6, 8])
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        settings: AdapterSettings,
        *,
        quantization: QuantizationBackend | None = None,
    ) -> None:
        super().__init__(base_layer, adapter_name, settings, quantization)
        base = self.get_base_layer()
        self.fan_in_fan_out = isinstance(base, Conv1D)
        # For the usual base layers W0 is read. Others are called: they may compute more than x W0ᵀ + b.
        plain = type(base_layer) is Conv1D or type(base_layer).forward is nn.Linear.forward
        self._reads_weight = plain or (quantization is not None and base is base_layer)

    def _base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shard = self._shard
        if shard is None:
            return super()._base_output(x, *args, **kwargs)
        weight, bias = self._stored_weight(), self.get_base_layer().bias
        y = F.linear(shard.local(x), weight.T if self.fan_in_fan_out else weight)
        return shard.output(y if bias is None else y + shard.bias(bias))

    def _adapted(self, x: Tensor, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        own = self.settings
        names = [name for name in adapter_names if name in own]
        if not names or not self._reads_weight or args or kwargs:
            y, rest = self._base_output(x, *args, **kwargs), names
        else:
            # A product has one dropout mask; adapters with another probability get products of their own below.
            p, rest = self._dropout_p(names[0]), []
            if len(names) > 1:
                rest = [name for name in names if self._dropout_p(name) != p]
                names = [name for name in names if name not in rest]
            base = self.get_base_layer()
            weight = base._parameters.get("weight")
            if weight is None or not weight.is_meta:
                y = self._linear(x, base, names, p, keep=True)
            else:  # offloaded by accelerate
                with present(self):
                    y = self._linear(x, base, names, p, keep=False)
        return self._add_outputs(y, x, rest) if rest else y

    def _linear(self, x: Tensor, base: Any, names: Sequence[str], dropout_p: float, *, keep: bool) -> Tensor:
        if x.is_nested:
            return over_rows(partial(self._linear, base=base, names=names, dropout_p=dropout_p, keep=keep), x)
        config, shard = self.settings[names[0]], self._shard
        settings: Any = {"dropout_p": dropout_p, "algorithm": config.algorithm, "backend": config.backend}
        if self.quantization_backend is not None:
            adapter = self._summed(x.new_empty(()).expand(self.out_features, self.in_features), names)
            return dequantized_linear(x, base, self._dequantize, adapter, **settings)
        bias = parameter(base, "bias")
        adapter = cast_factors(self._summed(self.base_weight(), names, keep), x.dtype)
        if shard is None:
            return adapted_linear(x, bias, adapter, **settings)
        bias, settings["column_offset"] = None if bias is None else shard.bias(bias), shard.column_offset
        return shard.output(adapted_linear(shard.local(x), bias, adapter, **settings))

    def _adapter_output(self, x: Tensor, name: str) -> Tensor:
        if self._shard is not None:
            raise RuntimeError(
                f"adapter {name!r} drops out with another probability than the first active one, which tensor "
                "parallelism does not take: activate adapters of one smoa_dropout"
            )
        return super()._adapter_output(x, name)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say that PEFT can factorise the additive ΔW of any adapter; as a rule that takes a rank far above r."""
        return True
