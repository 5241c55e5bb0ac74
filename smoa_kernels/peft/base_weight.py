"""`BaseWeight`: the weight W0 under a layer's adapters: read, sketched, replaced by W_eff and put back.

A convolution's W0 (N, C', k, …) is read as the matrix (N, C) with C = C'·k·….
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from ..adapter import Adapter
from ..adapter_folder.settings import AdapterSettings
from ..backends import eager
from ..definition.experts import ExpertBlocks
from ..definition.packed import PackedAdapter
from ..definition.partition import BlockPartition
from ..definition.shard import FULLY_SHARDED, LayerShard
from ..definition.sketch import sketch_distance, sketch_weight
from ..functional import dense_update
from ..operators.dispatch import parameter
from .combine import sum_adapters
from .dequantize import read_weight
from .offload import check_present, present
from .quantized import requantize, rescale


class BaseWeight(BaseTunerLayer):  # type: ignore[misc]  # PEFT's types are not followed
    """A layer's W0 (N, C), or the W0 (E, N, C) of `stack` matrices, as the base layer holds it.

    Attributes:
        fan_in_fan_out: whether it is stored with its last two dimensions swapped.
        quantization_backend: PEFT's back end for the base layer if that is quantised.
        stack: (E,), the number of matrices that the layer adapts together; () for a single matrix.
        kernel_size: W0's dimensions beyond its second; () for a matrix.
        parameter_name: W0's name in the layer that owns it.
    """

    fan_in_fan_out: bool = False
    quantization_backend: QuantizationBackend | None = None
    stack: tuple[int, ...] = ()
    kernel_size: tuple[int, ...] = ()
    parameter_name: str = "weight"
    _matrices: Callable[[str, Tensor], Sequence[PackedAdapter]]  # an adapter, over each matrix of a W0
    in_features: int
    out_features: int
    smoa: Any  # nn.ModuleDict of adapters
    settings: dict[str, AdapterSettings]
    # W0 while the base layer holds W_eff: its values, or a layer over its quantised values (in a tuple, since a module
    # that is assigned directly becomes a child and is saved).
    _stored_base: Tensor | None = None
    _stored_layer: tuple[nn.Module, ...] = ()
    _shard: LayerShard | None = None  # where tensor parallelism has cut W0

    def get_base_layer(self) -> Any:
        """The layer that owns W0, below the layers of other tuners; as PEFT's, in a fifth of its time."""
        layer: Any = self
        while "base_layer" in layer._modules:
            layer = layer._modules["base_layer"]
        return layer

    def base_weight(self) -> Tensor:
        """W0, never W_eff. A quantised weight is dequantised anew; of a sharded weight this is the process's part."""
        if self.quantization_backend is not None:
            return self._dequantize()
        weight = self._stored_weight()
        if self._stored_base is not None:
            weight = self._stored_base.to(weight.device, weight.dtype)
        if type(weight) is not nn.Parameter or hasattr(weight, "ds_id"):
            check_present(weight)
            # FSDP's is a view of a flat parameter that holds both frozen and trained weights.
            weight = weight.detach()
        if self.kernel_size:
            return weight.flatten(1)
        return weight.mT if self.fan_in_fan_out else weight

    @property
    def adapter_device(self) -> torch.device:
        """Where the layer's adapters are."""
        adapter: Adapter = next(iter(self.smoa.values()))
        return adapter.ranks.device

    def base_sketch(self) -> Tensor:
        """Sketch the whole W0, (33,), or each matrix of a stack."""
        weight = self.base_weight() if self._shard is None else self.get_base_layer().weight
        return torch.stack([*map(sketch_weight, weight)]) if self.stack else sketch_weight(weight)

    def base_distance(self, sketch: Tensor) -> float:
        """The largest distance between the sketches of W0's matrices and `sketch`; 0 on the meta device."""
        own = self.base_sketch()
        if own.is_meta:
            return 0.0
        return max(map(sketch_distance, sketch.view(-1, own.shape[-1]), own.view(-1, own.shape[-1])))

    def computations(self, adapter_name: str) -> list[Callable[[], BlockPartition]]:
        """Functions that compute an adapter's blocks of each matrix of W0; a single one if all share their blocks.

        W0 is read only if its values decide.
        """
        rule, groups = self.settings[adapter_name].rule, self.smoa[adapter_name].col_group
        if not rule.needs_weight:
            shape = self.out_features, self.in_features
            return [partial(rule.of_shape, shape, self.adapter_device, groups)]
        weight = self.base_weight().detach()
        if not self.stack:
            return [partial(rule.build, weight, groups)]
        if rule.block_order == "shared":
            return [partial(BlockPartition.from_experts, weight, rule.num_blocks, granule=rule.granules)]
        return [partial(rule.build, matrix) for matrix in weight]

    def joined(self, partitions: Sequence[BlockPartition]) -> Any:
        """The blocks of W0 from the partitions of its matrices, or from the partition that all share."""
        if not self.stack:
            return partitions[0]
        rows, cols = ([getattr(p, side) for p in partitions] for side in ("row_block", "col_block"))
        return ExpertBlocks.from_labels(torch.stack(rows), torch.stack(cols), partitions[0].num_blocks)

    @property
    def parameter(self) -> nn.Parameter | None:
        """The innermost layer's parameter that is adapted; None if there is none of that name (it is computed)."""
        return cast("nn.Parameter | None", self.get_base_layer()._parameters.get(self.parameter_name))

    def _stored_weight(self) -> Tensor:
        """The innermost layer's weight as it is stored; of a sharded weight this process's part."""
        weight: Tensor = parameter(self.get_base_layer(), self.parameter_name)
        return weight if self._shard is None else self._shard.weight(weight)

    def _dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        layer = self._stored_layer[0] if self._stored_layer else self.get_base_layer()
        return read_weight(self.quantization_backend, layer, dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put W_eff, the W0 + Σ ΔW that the layer multiplies by, into the base layer; W0 is kept for :meth:`unmerge`.

        Half types are rounded by thresholds (docs/numerics.md). A base that is quantised is quantised anew, unless the
        adapters' `group_size` fits the scales of bitsandbytes' four bits, which are then multiplied.

        Args:
            safe_merge: raise, and change nothing, where the result is not finite.
            adapter_names: the adapters to merge; the active ones when None.

        Raises:
            ValueError: `safe_merge` found NaN or Inf.
            RuntimeError: the base weight is offloaded, computed, or also another tuner's, which has not merged its
                adapters.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.smoa]
        if not names:
            return
        inner: Any = getattr(self, "base_layer", None)
        if isinstance(inner, BaseTunerLayer) and not inner.merged:
            # The other tuner would merge into W_eff, which unmerging replaces; unloading would lose its adapters.
            raise RuntimeError(
                f"the base layer holds adapters of another tuner ({type(inner).__qualname__}): merge and unload these "
                "before SMoA's are added, or do not merge"
            )
        stored = None if self.quantization_backend is not None else self._stored_weight()
        if stored is not None:
            self._check_writable(stored)
        before = [*self.merged_adapters]
        # If nothing is merged, the base is the stored weight itself, so each matrix is read before it is written.
        merged: Iterable[Tensor] = self._merged([*before, *names], self.base_weight())
        if safe_merge:
            merged = list(merged)
            if not all(bool(torch.isfinite(weight).all()) for weight in merged):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {','.join(names)} seems to be broken"
                )
        if stored is None:
            quantized = rescale(self, [self.smoa[name] for name in (*before, *names)])
            if quantized is None:
                quantized = requantize(self, *merged)
            self._stored_layer = self._stored_layer or (quantized,)
        else:
            if self._stored_base is None:
                self._stored_base = stored.detach().to("cpu", copy=True)
            try:
                self._write(merged)
            except BaseException:  # Ctrl-C too
                if before:
                    self._write(self._merged(before, self.base_weight()))
                else:
                    self.unmerge()
                raise
        self.merged_adapters.extend(names)

    def _check_writable(self, stored: Tensor) -> None:
        if stored.is_meta:
            raise RuntimeError("the base weight is offloaded: merge the model (merge_adapter), not the layer")
        _check_unsharded(stored)
        base, name = self.get_base_layer(), f"{self.parameter_name}_"
        made_of = hasattr(base, "parametrizations") or any(key.startswith(name) for key in base._parameters)
        if self.parameter is None and made_of:  # under FSDP it is no parameter either, and can be written
            raise RuntimeError(
                "the base weight is computed anew in each forward (by a parametrisation, weight_norm or pruning): "
                "make it a parameter before merging"
            )

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put W0 back, bit for bit."""
        if self._stored_layer:
            holder: Any = self  # of the innermost layer; another tuner's may lie between
            while "base_layer" in holder.base_layer._modules:
                holder = holder.base_layer
            holder.base_layer = self._stored_layer[0]
        elif self._stored_base is not None:
            self._stored_weight().data.copy_(self._stored_base)
        else:
            warnings.warn("Already unmerged. Nothing to do.", UserWarning, stacklevel=2)
        self._stored_base, self._stored_layer = None, ()
        self.merged_adapters.clear()

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Compute ΔW of one adapter, by its name, to be added to W0: in the base weight's layout, at least float32."""
        with present(self):
            weight = self.base_weight()
            _check_unsharded(weight)
            wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
            deltas = [dense_update(matrix) for matrix in self._matrices(adapter, wide)]
        delta = torch.stack(deltas) if self.stack else deltas[0]
        return delta.mT if self.fan_in_fan_out else self._unflattened(delta)

    def _unflattened(self, weight: Tensor) -> Tensor:
        """A matrix (N, C) in the shape of a convolution's weight."""
        return weight.unflatten(1, (-1, *self.kernel_size)) if self.kernel_size else weight

    def _write(self, merged: Iterable[Tensor]) -> None:
        """Write W_eff to the base layer, matrix by matrix."""
        stored = self._stored_weight().data
        stored = stored.mT if self.fan_in_fan_out else stored
        into = stored.unbind() if self.stack else (stored,)
        for place, matrix in zip(into, merged, strict=True):
            place.copy_(self._unflattened(matrix))

    def _merged(self, names: Sequence[str], weight: Tensor) -> Iterator[Tensor]:
        """Compute W_eff of several adapters in W0's dtype, one matrix after another."""
        for parts in zip(*(self._matrices(name, weight.detach()) for name in names), strict=True):
            yield eager.modulated_weight(sum_adapters(parts) if len(parts) > 1 else parts[0])

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        # float8 is for storing W0, not for training factors: they stay in float32.
        return device, None if dtype is not None and dtype.itemsize < 2 else dtype


def _check_unsharded(weight: Tensor) -> None:
    if hasattr(weight, "full_tensor"):
        raise RuntimeError(FULLY_SHARDED)


def tied_layers(model: nn.Module) -> dict[str, BaseWeight]:
    """Layers whose weight is another module's too, by name; not those that are merged, offloaded or quantised.

    Raises:
        ValueError: a module has two names, and PEFT adapted it under one: merged, it would change under both.
    """
    modules = [*model.modules()]
    parents = Counter(id(child) for module in modules for child in module._modules.values())
    held = Counter(id(p) for module in modules for p in module._parameters.values())
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseWeight) or layer.merged or layer.quantization_backend is not None:
            continue
        if parents[id(layer.get_base_layer())] > 1:
            raise ValueError(
                f"{name}: its base layer has a second name in the model, where it is not adapted and would be merged "
                "too: put a copy there"
            )
        if (weight := layer.parameter) is not None and held[id(weight)] > 1 and not weight.is_meta:
            found[name] = layer
    return found


def untie(layer: BaseWeight) -> None:
    """Give a layer's weight memory of its own."""
    weight = layer.parameter
    assert weight is not None
    own = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    setattr(layer.get_base_layer(), layer.parameter_name, own)
