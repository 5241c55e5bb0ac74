"""`SMoALayer` holds the adapters of one layer: their factors, blocks and settings (docs/definition.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from ..adapter_folder.format import (
    STATE_KEYS,
    blocks_layout,
    check_shapes,
    pack_blocks,
    read_blocks,
    unpack_blocks,
)
from ..adapter_folder.settings import AdapterSettings
from ..checks import check_choice
from ..definition.block_rule import BlockRule
from ..definition.packed import PackedAdapter, draw_A, padding_masks, scaling_tensor
from ..definition.partition import BlockPartition
from ..definition.ranks import trainable_parameters
from ..definition.shard import LayerShard
from ..definition.thresholds import WHOLE
from ..layer_checks import call_always
from ..operators.dispatch import is_observed, is_traced
from .base_weight import BaseWeight
from .combine import single_block
from .offload import execution_device, gathered, is_offloaded, present
from .scaling import Scaling


class SMoALayer(BaseWeight):
    """A layer's adapters by name: all of :class:`smoa_kernels.peft.Linear` except its forward.

    N and C are the outputs and inputs of the layer, ρ is the largest rank of an adapter's blocks. In the methods
    `adapter_name` names an adapter of this layer.

    Attributes:
        smoa_A: parameters (ρ, C), by adapter.
        smoa_B: parameters (N, ρ), by adapter.
        smoa_blocks: uint8, see :mod:`smoa_kernels.adapter_folder.format`; zeros while they are yet to be loaded.
        in_features, out_features: C and N.
        settings: by adapter.

    Example:
        >>> from smoa_kernels.peft import Linear, SMoAConfig
        >>> layer = Linear(nn.Linear(8, 6), "default", SMoAConfig(r=4).for_layer(""))
        >>> layer.num_adapter_parameters("default"), layer.ranks("default").tolist()
        (28, [2, 2])
    """

    adapter_layer_names: tuple[str, ...] = ("smoa_A", "smoa_B")
    other_param_names: tuple[str, ...] = ("smoa_blocks", "scaling", "settings", "_prepared", "_kept")
    smoa_B: nn.ParameterDict

    def __init__(self) -> None:
        self.smoa_A = nn.ParameterDict()
        self.smoa_B = nn.ParameterDict()
        self.smoa_blocks = BufferDict(persistent=True)
        self._scaling: dict[str, Tensor] = {}  # no buffers, which would be rounded with W0
        self.settings: dict[str, AdapterSettings] = {}
        self._prepared: dict[str, Prepared] = {}
        self._kept: dict[str, PackedAdapter] = {}  # of the last call
        # The partition with a single block, made when there are several adapters to sum.
        self._whole: BlockPartition | None = None
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.register_load_state_dict_post_hook(_read_blocks)
        call_always(self.smoa_A)  # no call of the layer runs this hook

    @property
    def scaling(self) -> Scaling:
        """s by adapter. As in PEFT's LoRA, changing an entry changes the adapter from the next forward on."""
        return Scaling(self._scaling)

    @scaling.setter
    def scaling(self, values: Mapping[str, float]) -> None:
        self.scaling.update(values)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's s to `scale` times that of its settings, as PEFT's LoRA does; unknown names are ignored."""
        if adapter in self._scaling:
            self.scaling[adapter] = scale * self.settings[adapter].scaling

    def scale_layer(self, scale: float) -> None:
        """Multiply the s of the active adapters by `scale`."""
        for name in self._scaling.keys() & self.active_adapters:
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the s of the active adapters by `scale`, or restore that of their settings where it is None."""
        for name in self._scaling.keys() & self.active_adapters:
            self.scaling[name] = self.settings[name].scaling if scale is None else self.scaling[name] / scale

    def update_layer(self, adapter_name: str, settings: AdapterSettings) -> None:
        """Add an adapter of zeros. Its blocks come with weights that are loaded, or by :meth:`initialize`.

        Args:
            adapter_name: the new adapter's name.
            settings: its rank, blocks and scaling.

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
        rho = max(settings.ranks)
        self.scaling[adapter_name], self.settings[adapter_name] = settings.scaling, settings
        self.smoa_A[adapter_name] = nn.Parameter(torch.zeros(*self.stack, rho, self.in_features))
        self.smoa_B[adapter_name] = nn.Parameter(torch.zeros(*self.stack, self.out_features, rho))
        size = blocks_layout(self.out_features, self.in_features, settings.num_blocks).itemsize
        self.smoa_blocks[adapter_name] = torch.zeros(*self.stack, size, dtype=torch.uint8)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self._prepared.pop(adapter_name, None)
        self.set_adapter(self.active_adapters)

    @torch.no_grad()
    def initialize(self, adapter_name: str, partition: Any = None) -> None:
        """Compute the blocks of an adapter, from W0's spectrum if its rule says so, and draw its weights.

        Called when blocks are first needed and no weights were loaded. Adapters of this layer with the same rule share
        their blocks.

        Args:
            adapter_name: the adapter.
            partition: the blocks, where they are known; else those of another adapter with the same rule, or computed.

        Raises:
            RuntimeError: the adapter has weights already, so its labels should have come with them, or the layer is
                sharded.
        """
        A = self.smoa_A[adapter_name]
        if not A.is_meta and bool(A.any()):
            raise RuntimeError(
                f"adapter {adapter_name!r} was loaded without its block labels (smoa_blocks), and those of another "
                "spectrum would corrupt it"
            )
        if self._shard is not None:
            raise RuntimeError(
                f"adapter {adapter_name!r} has no block labels, and a part of a weight has no spectrum: load or "
                "initialize it before parallelize_module"
            )
        settings = self.settings[adapter_name]
        with gathered(self), present(self):
            if partition is None:
                partition = self.known_blocks(settings.rule)
            if partition is None:
                partition = self.joined([compute() for compute in self.computations(settings.rule)])
            sketch = self.base_sketch()
        if settings.use_lora_rate:
            settings = settings.at_lora_rate(sketch, self.out_features * self.in_features)
            self.scaling[adapter_name], self.settings[adapter_name] = settings.scaling, settings
        ranks = torch.tensor(settings.ranks, dtype=torch.int32, device=partition.device)
        self._set_blocks(adapter_name, partition, ranks, sketch)
        self.reset_adapter(adapter_name)

    def known_blocks(self, rule: BlockRule) -> Any:
        """The blocks of an adapter of this layer with the same rule; None if there is none."""
        known = (
            ready.partition for name, ready in self._prepared.items() if self.settings[name].rule == rule
        )
        return next(known, None)

    @torch.no_grad()
    def fill(self, adapter_name: str, adapter: PackedAdapter, source: str) -> None:
        """Put factors, blocks and ranks into an adapter that was just added.

        Args:
            adapter_name: the adapter that was just added.
            adapter: the new factors, blocks and ranks. Its `weight` is not read: it may be quantised or offloaded.
            source: an adapter of this layer, whose sketch of W0 is copied.
        """
        sketch = unpack_blocks(self.smoa_blocks[source], self.out_features, self.in_features).sketch
        self.smoa_A[adapter_name] = nn.Parameter(adapter.A, requires_grad=False)
        self.smoa_B[adapter_name] = nn.Parameter(adapter.B, requires_grad=False)
        self._set_blocks(adapter_name, adapter.partition, adapter.ranks, sketch)

    @torch.no_grad()
    def overwrite(self, adapter_name: str, given: Mapping[str, Tensor], settings: AdapterSettings) -> None:
        """Copy an adapter of the same shapes over one of this layer's, in place.

        Args:
            adapter_name: the adapter that is overwritten.
            given: the new tensors by `STATE_KEYS`.
            settings: the new adapter's.
        """
        for key in STATE_KEYS:
            getattr(self, key)[adapter_name].copy_(given[key])
        self.scaling[adapter_name], self.settings[adapter_name] = settings.scaling, settings
        # Labels were copied into the same object. They are unpacked now: the next forward may be compiled.
        before, now = self._prepared.pop(adapter_name, None), self._ready(adapter_name)
        if before is not None and before.partition == now.partition:
            # A CUDA graph that a user captured reads these tensors. `hotswap` has compared the ranks.
            self._prepared[adapter_name] = before

    def _set_blocks(self, adapter_name: str, partition: Any, ranks: Tensor, sketch: Tensor) -> None:
        partitions = partition.partitions(range(*self.stack)) if self.stack else [partition]
        packed, sketches = self.smoa_blocks[adapter_name], sketch.cpu().view(len(partitions), -1)
        matrices = [pack_blocks(p, ranks, one) for p, one in zip(partitions, sketches, strict=True)]
        packed.copy_(torch.stack(matrices).view_as(packed))
        self._prepare(adapter_name, partition, ranks)

    @torch.no_grad()
    def reset_adapter(self, adapter_name: str) -> None:
        """Draw A_k uniform in ±1/√C_k (Kaiming, a=√5); set B to zero, or draw it where the adapter is to be random."""
        ranks, partitions = self.ranks(adapter_name), self._partitions(adapter_name)
        for A, partition in zip(self._each(self.smoa_A[adapter_name]), partitions, strict=True):
            draw_A(A, partition, ranks)
        B = self.smoa_B[adapter_name]
        if self.settings[adapter_name].init_weights:
            B.zero_()
            return
        B.normal_()
        for each, partition in zip(self._each(B), partitions, strict=True):
            each.mul_(padding_masks(partition, ranks, B.shape[-1])[1])

    def partition(self, adapter_name: str) -> Any:
        """The `BlockPartition` of an adapter, of experts the `ExpertBlocks`; computed now if none was loaded."""
        return self._ready(adapter_name).partition

    def ranks(self, adapter_name: str) -> Tensor:
        """The rank of each block, int32 (K,)."""
        return self._ready(adapter_name).ranks

    def is_fresh(self, adapter_name: str) -> bool:
        """Whether an adapter was just added and has values to draw; on the meta device weights will be loaded."""
        # Both are checked: blocks are on W0's device, and PEFT may leave factors on the CPU then.
        on_meta = self.smoa_A[adapter_name].is_meta or self.smoa_blocks[adapter_name].is_meta
        return not on_meta and self.awaits_blocks(adapter_name)

    def awaits_blocks(self, adapter_name: str) -> bool:
        """Whether an adapter's blocks are yet to be loaded."""
        packed = self.smoa_blocks[adapter_name]
        return packed.is_meta or not bool(packed.any())

    def check_state(self, name: str, adapter_name: str, given: Mapping[str, Any]) -> Tensor | None:
        """Raise unless tensors that are about to be loaded are complete, fit this layer and are in range.

        Args:
            name: the layer's name, for messages.
            adapter_name: the adapter that they are to fill.
            given: tensors by `STATE_KEYS`, None for one that is missing.

        Returns:
            The sketch of the base weight that the adapter was trained over; None where the tensors are on the meta
            device.

        Raises:
            ValueError: naming the layer: a tensor is missing, corrupt, not dense or has another shape, or labels or
                ranks are out of range.
        """
        check_shapes(name, given, {key: getattr(self, key)[adapter_name].shape for key in STATE_KEYS})
        if given["smoa_blocks"].is_meta:
            return None
        return read_blocks(name, given, self.settings[adapter_name].r).sketch

    def num_adapter_parameters(self, adapter_name: str) -> int:
        """Count the trained parameters, `Σ r_k (N_k + C_k)` over all matrices, without padding."""
        ranks = self.ranks(adapter_name).tolist()
        return sum(trainable_parameters(each, ranks) for each in self._partitions(adapter_name))

    def _partitions(self, adapter_name: str) -> Sequence[BlockPartition]:
        """The blocks of each matrix."""
        blocks = self.partition(adapter_name)
        return blocks.partitions(range(*self.stack)) if self.stack else [blocks]

    def packed(self, adapter_name: str, weight: Tensor) -> Any:
        """Pair an adapter with W0 (N, C), or this process's part of it; autograd sees the factors.

        The pair is kept, with what a backend made of it, until one of its tensors is another object.
        """
        ready = self._ready(adapter_name)
        A, B, place = self.smoa_A[adapter_name], self.smoa_B[adapter_name], WHOLE
        if self._shard is not None:
            A, B, place = self._shard.local(A), self._shard.local(B), self._shard.place
        ranks, s = ready.ranks, ready.scaling
        kept = None if is_traced() else self._kept.get(adapter_name)  # a graph would depend on what is kept
        if kept is None or not kept.is_of(weight, A, B, ranks, s):
            kept = PackedAdapter(weight, A, B, ready.partition, ranks, s, ready.block_ranks, place)
            # A kept adapter keeps its tensors alive. Those that exist for this call alone are not kept: they are
            # computed, or loaded by accelerate's hook.
            owned = {*map(type, (weight, A, B))} == {nn.Parameter} and not is_offloaded(self.get_base_layer())
            if owned and not is_observed(weight, A, B):
                self._kept[adapter_name] = kept
        return kept

    def _matrices(self, adapter_name: str, weight: Tensor) -> Sequence[PackedAdapter]:
        packed = self.packed(adapter_name, weight)
        return packed.experts(range(*self.stack)) if self.stack else [packed]

    def _ready(self, adapter_name: str) -> Prepared:
        """Index tensors of an adapter, rebuilt from its labels where these were moved or loaded."""
        blocks = self.smoa_blocks
        packed, ready = blocks._buffers.get(adapter_name), self._prepared.get(adapter_name)
        if ready is not None and ready.packed is packed:
            return ready
        check_choice("adapter_name", adapter_name, blocks)
        packed = blocks[adapter_name]
        # These tensors are kept for later calls, so they are inference tensors only if the adapter's own are.
        with torch.inference_mode(packed.is_inference()):
            if self.awaits_blocks(adapter_name):
                self.initialize(adapter_name)
                return self._prepared[adapter_name]
            blocks = unpack_blocks(packed, self.out_features, self.in_features)
            return self._prepare(adapter_name, blocks.partition, blocks.ranks)

    def _prepare(self, adapter_name: str, partition: Any, ranks: Tensor) -> Prepared:
        if self._shard is not None:
            partition = partition.shard(self._shard.rows, self._shard.cols)
        others = [each.partition for name, each in self._prepared.items() if name != adapter_name]
        if others and not self.stack:  # a stack has at most one active adapter
            # Equal partitions become one object, so that forward need not compare labels.
            same = (other for other in others if other.device == partition.device and other == partition)
            partition = next(same, partition)
            self._whole = single_block(partition)  # made now, since forward may be compiled
        s = self._scaling[adapter_name] = scaling_tensor(self._scaling[adapter_name], partition.device)
        ready = Prepared(self.smoa_blocks[adapter_name], partition, ranks, s, ranks.tolist())
        self._prepared[adapter_name] = ready
        return ready

    def extra_repr(self) -> str:
        """Show the shape, and K and r of each adapter."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        experts = [f"experts={count}" for count in self.stack]
        adapters = (f"{name}(r={one.r}, num_blocks={one.num_blocks})" for name, one in self.settings.items())
        return ", ".join([*experts, shape, *adapters])

    def __repr__(self) -> str:
        return f"smoa.{super().__repr__()}"

    def _cut(self, shard: LayerShard) -> None:
        """Compute from now on as one part of a layer whose parameters were sharded."""
        self._shard = shard
        self._prepared.clear()
        _read_blocks(self, None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for name, ready in list(self._prepared.items()):
            packed = self.smoa_blocks[name]
            if packed is ready.packed:
                continue
            del self._prepared[name]
            # `to("meta")` and `to_empty` discard the values, and new ones will be loaded.
            if not packed.is_meta and torch.equal(packed.cpu(), ready.packed.cpu()):
                self._ready(name)  # now, because the next forward may be compiled
        return self

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        device = execution_device(self.get_base_layer()) if device is None else device
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in self.smoa_A:
            given = {key: state_dict.get(f"{prefix}{key}.{name}") for key in STATE_KEYS}
            if any(value is not None for value in given.values()):
                self.check_state(prefix.rstrip("."), name, given)
                self._prepared.pop(name, None)  # labels are copied in place, into the same object
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def layers_with(model: nn.Module, adapter_name: str, *, every_name: bool = True) -> dict[str, SMoALayer]:
    """The layers of a model that hold an adapter, by name; one of several names is under `every_name` or the first."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=not every_name)
        if isinstance(module, SMoALayer) and adapter_name in module.smoa_A
    }


class Prepared(NamedTuple):
    """Tensors that forward needs beside the parameters, made from the buffer `packed`."""

    packed: Tensor
    partition: Any  # `BlockPartition`, or `ExpertBlocks` of a stack
    ranks: Tensor
    scaling: Tensor  # the tensor of `_scaling`; replicas of `nn.DataParallel` share that dictionary
    block_ranks: list[int]


def _read_blocks(layer: SMoALayer, _: object) -> None:
    """Unpack labels that were just loaded: now, because the next forward may be compiled."""
    for name in layer.smoa_A:
        if not layer.awaits_blocks(name):
            layer._ready(name)
