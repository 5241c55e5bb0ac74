"""Layers with SMoA adapters that are not linear: each computes what its base layer does, with W_eff in place of W0.

Where a module computes with several parameters, an `AdaptedModule` takes its place, with a `ParameterLayer` for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter_folder.settings import AdapterSettings
from ..definition.precision import without_autocast
from ..functional import dense_update, embedded_rows, for_autocast, modulate, modulated_convolution
from ..layer_checks import check_embedding, has_forward_of
from .layer import AdaptedLayer, SMoALayer
from .offload import execution_device, present


@contextmanager
def replaced(weights: Mapping[tuple[nn.Module, str], Tensor]) -> Iterator[None]:
    """Let modules compute with other tensors than their parameters, given by module and name, within the block."""
    # An entry of the instance goes before parameters, also where FSDP or accelerate replaces these during the call.
    before = {place: vars(place[0]).get(place[1]) for place in weights}
    for (module, name), weight in weights.items():
        vars(module)[name] = weight
        if getattr(module, name) is not weight:
            raise RuntimeError(f"{name} of {type(module).__name__} is computed: it cannot be adapted")
    try:
        yield
        if any(vars(module).get(name) is not weight for (module, name), weight in weights.items()):
            raise RuntimeError(
                "the base layer is wrapped by itself: wrap a module around the adapted layer instead"
            )
    finally:
        for (module, name), held in before.items():
            if held is None:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = held


class Convolution(AdaptedLayer):
    """Convolution with `W0 + Σ ΔW` over its active adapters; W0 and the bias stay the base layer's.

    W0 (N, C', k, …) counts as a matrix (N, C) with C = C'·k·…, for blocks and factors (SMoA, arXiv 2605.21147; equation
    (2) of docs/definition.md). Under dropout an adapter's ΔW is applied to `dropout(x)`.

    Args:
        base_layer: `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`, of any groups, or another tuner's layer around it.
        adapter_name: the first adapter's name.
        settings: the first adapter's settings; `algorithm` does not count.

    Example:
        >>> from peft import get_peft_model
        >>> from smoa_kernels.peft import SMoAConfig
        >>> model = get_peft_model(nn.Sequential(nn.Conv2d(4, 6, 3)), SMoAConfig(r=4, target_modules=["0"]))
        >>> model.base_model.model[0].get_delta_weight("default").shape
        torch.Size([6, 4, 3, 3])
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, settings: AdapterSettings) -> None:
        super().__init__(base_layer, adapter_name, settings)
        base = self.get_base_layer()
        self.kernel_size = base.kernel_size
        # Other classes may compute more than the convolution.
        self._plain = has_forward_of(base, nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def _adapted(self, x: Tensor, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        base, names = self.get_base_layer(), [name for name in adapter_names if name in self.settings]
        # Another tuner's layer is called, since it adds to the convolution.
        merged = [name for name in names if base is self.base_layer and not self._dropout_p(name)]
        if not merged:
            y = self._base_output(x, *args, **kwargs)
        else:
            with present(self):
                if self._plain:
                    y = modulated_convolution(x, base, *self._modulation(merged))
                else:
                    y = self._called(x, self.effective_weight(merged), *args, **kwargs)
        return self._add_outputs(y, x, [name for name in names if name not in merged])

    def _adapter_output(self, x: Tensor, name: str) -> Tensor:
        if self._plain:
            return super()._adapter_output(x, name)
        # What the module computes with W0 + ΔW beyond what it computes with W0; in half types a small ΔW would be lost.
        wide = torch.promote_types(x.dtype, torch.float32)
        with present(self), without_autocast(x):
            W0 = self.base_weight()
            delta, x_wide = dense_update(self.packed(name, W0)), x.to(wide)
            weights = (self._unflattened(matrix) for matrix in (W0.to(wide) + delta, W0.to(wide)))
            x_wide = F.dropout(x_wide, self._dropout_p(name), training=True)
            adapted, plain = (self._called(x_wide, weight) for weight in weights)
        return (adapted - plain).to(x.dtype)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        return cast(Tensor, self.get_base_layer()._conv_forward(x, weight, None))

    def _called(self, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.get_base_layer()
        weights = {(base, "weight"): weight}
        if base.bias is not None and base.bias.dtype != weight.dtype:
            weights[base, "bias"] = base.bias.to(weight.dtype)
        with replaced(weights):
            return cast(Tensor, base(x, *args, **kwargs))


class Embedding(AdaptedLayer):
    """Embedding with the rows of `W0 + Σ ΔW` over its active adapters; W0 (N, C) holds C numbers for each of N entries.

    Only the rows that x names are computed. SMoA (arXiv 2605.21147), equation (2) of docs/definition.md. Indices have
    no elements to drop, so `smoa_dropout` does not count. `padding_idx`, `scale_grad_by_freq` and `sparse` of the base
    layer count for B as they do for a trained weight.

    Args:
        base_layer: `nn.Embedding`, or another tuner's layer around it.
        adapter_name: the first adapter's name.
        settings: the first adapter's settings; `algorithm` and `backend` do not count.

    Example:
        >>> from peft import get_peft_model
        >>> from smoa_kernels.peft import SMoAConfig
        >>> model = get_peft_model(nn.Sequential(nn.Embedding(8, 6)), SMoAConfig(r=4, target_modules=["0"]))
        >>> model.base_model.model[0].get_delta_weight("default").shape
        torch.Size([8, 6])
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, settings: AdapterSettings) -> None:
        super().__init__(base_layer, adapter_name, settings)
        base = self.get_base_layer()
        check_embedding("the layer", base)
        # Other classes may compute x, as those of positions do; those that scale rows look them up by x.
        self._by_rows = type(base).forward is nn.Embedding.forward or hasattr(base, "embed_scale")

    def _adapted(self, x: Tensor, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        base, names = self.get_base_layer(), [name for name in adapter_names if name in self.settings]
        if not names:
            return self._base_output(x, *args, **kwargs)
        if self._by_rows:
            rows = base(x, *args, **kwargs)
            with present(self):
                y: Tensor = embedded_rows(
                    x, base, rows, self._summed(rows.reshape(-1, rows.shape[-1]), names)
                )
        else:
            with present(self), replaced({(base, "weight"): self.effective_weight(names)}):
                y = base(x, *args, **kwargs)
        if base is self.base_layer:
            return y
        return cast(Tensor, self._base_output(x, *args, **kwargs) + (y - base(x, *args, **kwargs)))


class ParameterLayer(SMoALayer, nn.Module):
    """The adapters of one parameter of a module. It owns no weight, and an :class:`AdaptedModule` calls it.

    Args:
        owner: the module that owns the parameter.
        parameter_name: the parameter's name in it.
    """

    def __init__(self, owner: nn.Module, parameter_name: str) -> None:
        nn.Module.__init__(self)
        SMoALayer.__init__(self)
        self._owner = (owner,)  # in a tuple, since a module that is assigned directly becomes a child
        self.parameter_name = parameter_name
        self._active_adapter: list[str] = []
        shape = self._stored_weight().shape
        self.out_features, self.in_features = shape[-2:]

    @property
    def bias(self) -> Tensor | None:
        """A copy of the owner's, for torch's encoder; `bias="smoa_only"` would train what PEFT would not save."""
        bias: Tensor | None = getattr(self._owner[0], "bias", None)
        return None if bias is None else bias.detach().clone()

    def get_base_layer(self) -> nn.Module:
        """The module that owns the parameter."""
        return self._owner[0]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        weight = self._stored_weight()
        return weight.device, weight.dtype


class AdaptedModule(nn.Module):
    """A module with adapters of its parameters, which stay its own; the adapters of each parameter are a child.

    Args:
        base_layer: the module.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    @property
    def weights(self) -> dict[str, Any]:
        """The adapters of each adapted parameter, by the child's name."""
        return {name: child for name, child in self._modules.items() if isinstance(child, ParameterLayer)}

    def _unmerge_disabled(self) -> None:
        for weight in self.weights.values():
            if weight.disable_adapters and weight.merged:
                weight.unmerge()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base module, with adapters merged into its weights if `merge`; PEFT calls it to unload.

        As with PEFT's layers, adapters that were merged before stay merged.
        """
        if merge:
            for weight in self.weights.values():
                weight.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer


class Attention(AdaptedModule):
    """`nn.MultiheadAttention` that computes with `W0 + Σ ΔW` of its projections over the active adapters.

    Its child `in_proj` adapts `in_proj_weight` (three children adapt `q_proj_weight`, `k_proj_weight` and
    `v_proj_weight` where there are three), `out_proj` the output's weight. Patterns such as `rank_pattern` name these
    children. SMoA (arXiv 2605.21147), equation (2) of docs/definition.md. Other attributes are the base module's.

    Args:
        base_layer: the `nn.MultiheadAttention`.

    Example:
        >>> from peft import get_peft_model
        >>> from smoa_kernels.peft import SMoAConfig
        >>> model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16))
        >>> model = get_peft_model(model, SMoAConfig(r=4, target_modules=["self_attn"]))
        >>> [*model.base_model.model[0].self_attn.weights]
        ['in_proj', 'out_proj']
    """

    def __init__(self, base_layer: nn.MultiheadAttention) -> None:
        super().__init__(base_layer)
        for name in ("in_proj", "q_proj", "k_proj", "v_proj"):
            if base_layer._parameters.get(f"{name}_weight") is not None:
                self._modules[name] = ParameterLayer(base_layer, f"{name}_weight")
        self._modules["out_proj"] = ParameterLayer(base_layer.out_proj, "weight")

    def __getattr__(self, name: str) -> Any:
        """Torch's encoder reads attributes of its attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            # The encoder nests a padded batch unless one of these needs a gradient, as W_eff does.
            with replaced(self._adapted() if name == "in_proj_weight" else {}):
                return getattr(self.base_layer, name)

    def update_layer(self, adapter_name: str, settings_of: Callable[[str], AdapterSettings]) -> None:
        """Add an adapter of zeros to each weight, of the settings for its name in this module.

        See :meth:`smoa_kernels.peft.SMoALayer.update_layer`.
        """
        if execution_device(self.base_layer) is not None:
            raise ValueError("an nn.MultiheadAttention that accelerate offloads cannot be adapted")
        for name, weight in self.weights.items():
            settings = settings_of(name)
            if settings.smoa_dropout:
                raise ValueError(
                    f"smoa_dropout must be 0 where nn.MultiheadAttention is adapted, got {settings.smoa_dropout}: its "
                    "weights take no input of their own"
                )
            weight.update_layer(adapter_name, settings)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the base module does, which gets the arguments, with the adapted weights."""
        self._unmerge_disabled()
        with replaced(self._adapted()):
            return self.base_layer(*args, **kwargs)

    def _adapted(self) -> dict[tuple[nn.Module, str], Tensor]:
        adapted = {}
        is_plain = type(self.base_layer).forward is nn.MultiheadAttention.forward  # others may leave autocast
        for weight in self.weights.values():
            names = [name for name in weight.active_adapters if name in weight.smoa]
            if names and not weight.disable_adapters and not weight.merged:
                adapter, backend = weight._modulation(names)
                place = weight.get_base_layer(), weight.parameter_name
                adapted[place] = modulate(for_autocast(adapter) if is_plain else adapter, backend)
        return adapted
