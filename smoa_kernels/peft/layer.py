"""`SMoALayer` holds the adapters of one weight and their settings; `AdaptedLayer` takes the place of a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..adapter import ALL_KEYS, Adapter
from ..adapter_folder.settings import AdapterSettings
from ..checks import check_choice
from ..definition.labels import of_groups, same_groups
from ..definition.packed import PackedAdapter
from ..definition.partition import BlockPartition
from ..definition.shard import LayerShard
from ..functional import cast_factors, dense_update, modulate
from ..layer_checks import call_always, matrix_shape
from .base_weight import BaseWeight
from .combine import single_block, sum_adapters
from .offload import execution_device, gathered, present
from .scaling import Scaling


class SMoALayer(BaseWeight):
    """A layer's adapters by name: all of :class:`smoa_kernels.peft.Linear` except its forward.

    In the methods `adapter_name` names an adapter of this layer.

    Attributes:
        smoa: the adapters, each an :class:`smoa_kernels.adapter.Adapter`, by name.
        in_features, out_features: C and N, the columns and rows of W0: of a linear layer its inputs and outputs.
        settings: by adapter.

    Example:
        >>> from smoa_kernels.peft import Linear, SMoAConfig
        >>> layer = Linear(nn.Linear(8, 6), "default", SMoAConfig(r=4).for_layer(""))
        >>> layer.ranks("default").tolist(), layer.smoa["default"].num_parameters
        ([2, 2], 28)
    """

    adapter_layer_names: tuple[str, ...] = ("smoa",)
    other_param_names: tuple[str, ...] = ("scaling", "settings")

    def __init__(self) -> None:
        self.smoa = nn.ModuleDict()
        self.settings: dict[str, AdapterSettings] = {}
        # The partition with a single block, made when there are several adapters to sum.
        self._single_block: BlockPartition | None = None
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.register_load_state_dict_post_hook(SMoALayer._share_blocks)
        call_always(self.smoa)  # no call of the layer runs this hook

    @property
    def scaling(self) -> Scaling:
        """s by adapter. As in PEFT's LoRA, changing an entry changes the adapter from the next forward on."""
        return Scaling(self.smoa)

    @scaling.setter
    def scaling(self, values: Mapping[str, float]) -> None:
        self.scaling.update(values)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's s to `scale` times that of its settings, as PEFT's LoRA does; unknown names are ignored."""
        if adapter in self.smoa:
            self.scaling[adapter] = scale * self.settings[adapter].scaling

    def scale_layer(self, scale: float) -> None:
        """Multiply the s of the active adapters by `scale`."""
        for name in self.smoa.keys() & self.active_adapters:
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the s of the active adapters by `scale`, or restore that of their settings where it is None."""
        for name in self.smoa.keys() & self.active_adapters:
            self.scaling[name] = self.settings[name].scaling if scale is None else self.scaling[name] / scale

    def update_layer(self, adapter_name: str, settings: AdapterSettings) -> None:
        """Add an adapter of zeros. Its blocks come with weights that are loaded, or by :meth:`initialize`.

        Raises:
            TypeError, ValueError: the settings do not fit the layer, or it is sharded. Nothing is added.
        """
        if self._shard is not None:
            raise ValueError("the layer is sharded: add adapters before parallelize_module")
        try:
            settings.rule.check((self.out_features, self.in_features), "a layer")
        except ValueError as error:  # a value head has one row
            raise ValueError(
                f"{error}; num_blocks_pattern and granule_pattern give a layer its own, exclude_modules leaves it out"
            ) from error
        shape = *self.stack, self.out_features, self.in_features
        groups = settings.rule.group_size
        self.smoa[adapter_name] = Adapter(shape, settings.ranks, settings.scaling, group_size=groups)
        self.settings[adapter_name] = settings
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    @torch.no_grad()
    def initialize(self, adapter_name: str, partition: Any = None) -> None:
        """Compute the blocks of an adapter, from W0's spectrum if its rule says so, and draw its weights.

        Called when blocks are first needed and no weights were loaded. Adapters of this layer with the same rule share
        their blocks.

        Args:
            partition: the blocks, where they are known; else those of another adapter with the same rule, or computed.

        Raises:
            RuntimeError: the adapter has weights already, so its labels should have come with them, or the layer is
                sharded.
        """
        adapter, settings = self.smoa[adapter_name], self.settings[adapter_name]
        if not adapter.A.is_meta and bool(adapter.A.any()):
            raise RuntimeError(
                f"adapter {adapter_name!r} was loaded without its block labels, and those of another spectrum would "
                "corrupt it"
            )
        if self._shard is not None:
            raise RuntimeError(
                f"adapter {adapter_name!r} has no block labels, and a part of a weight has no spectrum: load or "
                "initialize it before parallelize_module"
            )
        with gathered(self), present(self):
            if partition is None:
                partition = self.known_blocks(adapter_name)
            if partition is None:
                partition = self.joined([compute() for compute in self.computations(adapter_name)])
            sketch = self.base_sketch()
        if settings.use_lora_rate:
            settings = settings.at_lora_rate(sketch, self.out_features * self.in_features)
            self.scaling[adapter_name], self.settings[adapter_name] = settings.scaling, settings
        adapter.set_blocks(partition, sketch)
        adapter.reset(zero=settings.init_weights)
        self._share_blocks()

    def known_blocks(self, adapter_name: str) -> Any:
        """The blocks of an adapter of this layer with the same rule and groups; None if there is none."""
        rule, groups = self.settings[adapter_name].rule, self.smoa[adapter_name].col_group
        same = (self.smoa[name] for name, settings in self.settings.items() if settings.rule == rule)
        with present(self):
            known = (own for own in same if own.has_blocks and same_groups(own.col_group, groups))
            return next((own.partition for own in known), None)

    def fill(self, adapter_name: str, packed: PackedAdapter, source: str) -> None:
        """Put factors, blocks and ranks into an adapter that was just added.

        Args:
            packed: the new factors, blocks and ranks. Its `weight` is not read: it may be quantised or offloaded.
            source: an adapter of this layer, whose sketch of W0 is copied.
        """
        adapter, groups = self.smoa[adapter_name], self.smoa[source].col_group
        adapter.set_groups(groups)
        factors = of_groups(packed.A, adapter.group_size, groups).contiguous(), packed.B
        adapter.A, adapter.B = (nn.Parameter(factor, requires_grad=False) for factor in factors)
        adapter.set_blocks(packed.partition, self.smoa[source].sketch, packed.ranks.tolist())
        self._share_blocks()

    def _share_blocks(self, *_: object) -> None:
        """Let adapters of equal blocks have one partition, so that forward need not compare labels."""
        known: list[BlockPartition] = []
        for adapter in self.smoa.values() if len(self.smoa) > 1 else ():
            if self.stack or not adapter.is_current():  # of a stack at most one adapter is active
                continue
            own = adapter.partition
            equal = (seen for seen in known if seen is own or (seen.device == own.device and seen == own))
            if (shared := next(equal, None)) is None:
                known.append(own)
            elif shared is not own:
                adapter.share(shared)
        if known:
            self._single_block = single_block(known[0])  # made now, since forward may be compiled

    def partition(self, adapter_name: str) -> Any:
        """The `BlockPartition` of an adapter, of experts the `ExpertBlocks`; computed now if none was loaded."""
        return self._ready(adapter_name).partition

    def ranks(self, adapter_name: str) -> Tensor:
        """The rank of each block, int32 (K,)."""
        return self._ready(adapter_name).ranks

    def packed(self, adapter_name: str, weight: Tensor, keep: bool = False) -> Any:
        """Pair an adapter with W0, as :meth:`smoa_kernels.adapter.Adapter.packed` does."""
        return self._ready(adapter_name).packed(weight, keep=keep)

    def _summed(self, weight: Tensor, names: Sequence[str], keep: bool = False) -> PackedAdapter:
        first: PackedAdapter = self.packed(names[0], weight, keep)
        if len(names) == 1:
            return first
        return sum_adapters([first, *(self.packed(name, weight) for name in names[1:])], self._single_block)

    def effective_weight(self, adapter_names: Sequence[str]) -> Tensor:
        """Compute W_eff of one or more adapters, in W0's shape and dtype, differentiable in their factors."""
        return self._unflattened(modulate(*self._modulation(adapter_names)))

    def _modulation(self, adapter_names: Sequence[str]) -> tuple[PackedAdapter, str]:
        """The sum of adapters, over W0, and the `backend` that the first names."""
        weight = self.base_weight()
        adapter = cast_factors(self._summed(weight, adapter_names), weight.dtype)
        return adapter, self.settings[adapter_names[0]].backend

    def _matrices(self, adapter_name: str, weight: Tensor) -> list[PackedAdapter]:
        packed = self.packed(adapter_name, weight)
        return packed.experts(range(*self.stack)) if self.stack else [packed]

    def _ready(self, adapter_name: str) -> Adapter:
        """An adapter that has blocks: computed now if none were loaded, made of the labels that were."""
        adapters: Any = self._modules["smoa"]
        adapter: Adapter | None = adapters._modules.get(adapter_name)
        if adapter is None:
            check_choice("adapter_name", adapter_name, adapters)
        assert adapter is not None
        if not adapter.is_current():
            # These tensors are kept for later calls, so they are inference tensors only if the adapter's own are.
            with torch.inference_mode(adapter.ranks.is_inference()):
                if adapter.has_blocks:
                    adapter.read_labels()
                    self._share_blocks()
                else:
                    self.initialize(adapter_name)
        return adapter

    def extra_repr(self) -> str:
        """Show the shape."""
        experts = [f"experts={count}" for count in self.stack]
        return ", ".join([*experts, f"in_features={self.in_features}", f"out_features={self.out_features}"])

    def __repr__(self) -> str:
        return f"smoa.{super().__repr__()}"

    def _cut(self, shard: LayerShard) -> None:
        """Compute from now on as one part of a layer whose parameters were sharded."""
        self._shard = shard
        for adapter in self.smoa.values():
            adapter.cut(shard)
        self._share_blocks()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._share_blocks()
        return self

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        if adapter_name not in self.smoa:
            return
        base, adapter = self.get_base_layer(), self.smoa[adapter_name]
        own, dtype = self._get_base_layer_device_and_dtype(base)
        device = execution_device(base) or own if device is None else device
        if device is not None and not adapter.A.is_meta:
            adapter.to(device, dtype if dtype is not None and dtype.is_floating_point else None)


class AdaptedLayer(SMoALayer, nn.Module):
    """A layer of the model with adapters over it, which is called with one x; subclasses compute `_adapted`.

    Args:
        base_layer: the layer, or another tuner's around it.
        adapter_name, settings: of the first adapter.
        quantization: PEFT's back end for the base layer, where that is quantised.
    """

    _reads_weight = False  # whether `x W0ᵀ + b` is computed here, from the base layer's weight and bias

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        settings: AdapterSettings,
        quantization: QuantizationBackend | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        SMoALayer.__init__(self)
        self.quantization_backend = quantization
        self.out_features, self.in_features = matrix_shape(self.get_base_layer())
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, settings)

    def forward(
        self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Tensor:
        """Compute the layer with its active adapters; of a linear layer (..., C) -> (..., N) in x's dtype.

        Args:
            x: as the base layer takes it; for a linear layer it may be nested.
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
        return cast(Tensor, self.base_layer(x, *args, **kwargs))

    def _adapted(self, x: Tensor, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """Compute the layer with these adapters, of which it may lack some. Each kind of layer has its own."""
        raise NotImplementedError(type(self).__name__)

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

    def _add_outputs(self, y: Tensor, x: Tensor, names: Sequence[str]) -> Tensor:
        """Add to y what each of these adapters contributes alone."""
        for name in names:
            # Recomputed in backward, so that neither ΔW nor a dequantised W0 is kept.
            y = y + checkpoint(self._adapter_output, x, name, use_reentrant=False).to(y.dtype)
        return y

    def _adapter_output(self, x: Tensor, name: str) -> Tensor:
        """The product of `dropout(x)` and a dense ΔW, to be added to the base layer's own output."""
        with present(self):
            delta = self._unflattened(dense_update(self.packed(name, self.base_weight())))
        return self._product(F.dropout(x, self._dropout_p(name), training=True), delta.to(x.dtype))

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the layer computes with another weight, without its bias. Each kind of layer has its own."""
        raise NotImplementedError(type(self).__name__)


def layers_with(model: nn.Module, adapter_name: str, *, every_name: bool = True) -> dict[str, SMoALayer]:
    """The layers of a model that hold an adapter, by name: its first name, under `every_name` all its names."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=not every_name)
        if isinstance(module, SMoALayer) and adapter_name in module.smoa
    }


def keys_of(layer_name: str, adapter_name: str) -> dict[str, str]:
    """The keys in a model's state dict of the tensors of an adapter, by `ALL_KEYS`."""
    return {key: f"{layer_name}.smoa.{adapter_name}.{key}" for key in ALL_KEYS}
