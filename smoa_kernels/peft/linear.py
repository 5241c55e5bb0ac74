"""`Linear`: a linear layer with SMoA adapters; its forward, and how adapters are merged and unmerged."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from ..adapter_folder.settings import AdapterSettings
from ..definition.packed import PackedAdapter
from ..definition.precision import without_autocast
from ..functional import adapted_linear, cast_factors
from ..layer_checks import over_rows
from .combine import sum_adapters
from .layer import SMoALayer
from .offload import present
from .quantized import dequantized_linear


class Linear(SMoALayer, nn.Module):
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
        nn.Module.__init__(self)
        self.base_layer = base_layer
        SMoALayer.__init__(self)
        self.quantization_backend = quantization
        base = self.get_base_layer()
        self.fan_in_fan_out = isinstance(base, Conv1D)
        if self.fan_in_fan_out:  # the weight's own shape is empty under ZeRO-3
            self.in_features, self.out_features = base.nx, base.nf
        else:
            self.in_features, self.out_features = base.in_features, base.out_features
        # For the usual base layers W0 is read. Others are called: they may compute more than x W0ᵀ + b.
        layer_type = type(base_layer)
        forward = getattr(layer_type, "forward", None)
        plain = layer_type is Conv1D or forward is nn.Linear.forward
        self._reads_weight = plain or (quantization is not None and base is base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, settings)

    def forward(
        self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Tensor:
        """Compute (..., C) -> (..., N), in x's dtype.

        Args:
            x: floating point, any leading dimensions; it may be nested.
            adapter_names: in evaluation, an adapter (or "__base__") for each sample.
            args, kwargs: passed to the base layer.

        Raises:
            TypeError, ValueError: as :func:`smoa_kernels.smoa_linear` does; or `adapter_names` has another length than
                x has samples, or is given while adapters are merged.
        """
        if adapter_names is not None:
            self._check_mixed_batch(x, adapter_names)
        if self._disable_adapters and self.merged:
            self.unmerge()
        if self._disable_adapters or self.merged_adapters:
            return self._base_output(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, adapter_names, *args, **kwargs)
        active: Any = self._active_adapter
        return self._adapted(x, [active] if isinstance(active, str) else active, *args, **kwargs)

    def _base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shard = self._shard
        if shard is None:
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
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
        for name in rest:
            # Recomputed in backward, so that neither ΔW nor a dequantised W0 is kept.
            y = y + checkpoint(self._adapter_output, x, name, use_reentrant=False).to(y.dtype)
        return y

    def _linear(self, x: Tensor, base: Any, names: Sequence[str], dropout_p: float, *, keep: bool) -> Tensor:
        if x.is_nested:
            return over_rows(partial(self._linear, base=base, names=names, dropout_p=dropout_p, keep=keep), x)
        config, shard = self.settings[names[0]], self._shard
        settings: Any = {"dropout_p": dropout_p, "algorithm": config.algorithm, "backend": config.backend}
        if self.quantization_backend is not None:
            adapter = self._summed(x.new_empty(()).expand(self.out_features, self.in_features), names)
            return dequantized_linear(x, base, self._dequantize, adapter, **settings)
        bias, adapter = base.bias, cast_factors(self._summed(self.base_weight(), names, keep), x.dtype)
        if shard is None:
            return adapted_linear(x, bias, adapter, **settings)
        bias, settings["column_offset"] = None if bias is None else shard.bias(bias), shard.column_offset
        return shard.output(adapted_linear(shard.local(x), bias, adapter, **settings))

    def _adapter_output(self, x: Tensor, name: str) -> Tensor:
        """Compute `dropout(x) ΔWᵀ` with a dense ΔW, to be added to the base layer's own output."""
        if self._shard is not None:
            raise RuntimeError(
                f"adapter {name!r} drops out with another probability than the first active one, which tensor "
                "parallelism does not take: activate adapters of one smoa_dropout"
            )
        with present(self), without_autocast(x):
            adapter = self.packed(name, self.base_weight())
            A, B = adapter.expanded_factors(torch.promote_types(adapter.weight.dtype, torch.float32))
            delta = (B @ A) * adapter.weight
        x = F.dropout(x, self._dropout_p(name), training=True)
        return F.linear(x, delta.to(x.dtype))

    def _mixed_batch_forward(
        self, x: Tensor, adapter_names: Sequence[str], *args: Any, **kwargs: Any
    ) -> Tensor:
        parts, order = [], []
        # An empty batch also needs one product, for the shape.
        for name in dict.fromkeys(adapter_names or ("__base__",)):
            samples = [i for i, given in enumerate(adapter_names) if given == name]
            index = torch.tensor(samples, dtype=torch.int64, device=x.device)
            parts.append(self._adapted(x.index_select(0, index), [name], *args, **kwargs))
            order.append(index)
        return torch.cat(parts).index_select(0, torch.cat(order).argsort())

    def _check_mixed_batch(self, x: Tensor, adapter_names: Sequence[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _dropout_p(self, name: str) -> float:
        return self.settings[name].smoa_dropout if self.training else 0.0

    def _summed(self, weight: Tensor, names: Sequence[str], keep: bool = False) -> PackedAdapter:
        first: PackedAdapter = self.packed(names[0], weight, keep)
        if len(names) == 1:
            return first
        return sum_adapters([first, *(self.packed(name, weight) for name in names[1:])], self._whole)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say that PEFT can factorise the additive ΔW; as a rule that takes a rank far above r.

        Args:
            adapter_name: any.
        """
        return True
