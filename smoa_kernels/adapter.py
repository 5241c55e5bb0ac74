"""`Adapter`: the SMoA adapter of one weight, or of a stack of weights of one shape (docs/definition.md).

Both layers hold adapters, the operator takes them packed with a weight, and a folder stores their tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_finite, check_like, granules
from .definition.experts import ExpertBlocks
from .definition.labels import check_groups, check_map, check_range, group_position, label_dtype, of_columns
from .definition.packed import PackedAdapter, draw_A, padding_masks, scaling_tensor
from .definition.partition import BlockPartition
from .definition.ranks import trainable_parameters
from .definition.shard import LayerShard
from .definition.sketch import SKETCH_SIZE
from .definition.thresholds import ORIGIN
from .operators.dispatch import is_observed, parameter

# An adapter's tensors, as state dicts and safetensors files name them, those that some adapters have beside them, and
# those that say where its blocks are.
STATE_KEYS = ("A", "B", "row_block", "col_block", "ranks", "sketch", "scaling")
ALL_KEYS = (*STATE_KEYS, "col_group")
LABELS = ("row_block", "col_block", "ranks")


class Adapter(nn.Module):
    """Factors, block labels, ranks and scale: all that `ΔW = s · mask ∘ (B A) ∘ W0` takes beside W0 (N, C).

    ρ is the largest rank of its K blocks. For a stack of E weights, each tensor but `ranks` and `scaling` has E as a
    further first dimension. Moving, casting, saving and loading are `nn.Module`'s; a cast changes the factors alone.

    With a `group_size` g above 1, A has one column for each g adjacent columns of W0 (docs/four_bits.md), or for each
    group of g that `col_group` names.

    Args:
        shape: (N, C), or (E, N, C).
        ranks: rank of each block.
        scaling: s.
        group_size: g; the last group may be short.
        device: of all tensors. On the meta device `scaling` stays on the CPU.
        dtype: of the factors.

    Attributes:
        A, B: parameters (ρ, ⌈C / g⌉) and (N, ρ); zeros until :meth:`reset`.
        row_block, col_block: the block of each row (N,) and column (C,), uint8, or int32 above 256 blocks.
        ranks: int32 (K,); zeros until there are blocks.
        sketch: float32 (33,), of the W0 that the adapter is trained on.
        col_group: the group of each column, int32 (C,), of a base in act-order (`definition/labels.py`); None where
            groups are of adjacent columns. It is set before there are blocks, or loaded with them.
        scaling: s, 0-d.
        block_ranks: the numbers in `ranks`.
        stack: (E,), or () for a single weight.
        shard: the part of the weight that this process holds, under tensor parallelism.
    """

    A: Tensor
    B: Tensor
    row_block: Tensor
    col_block: Tensor
    ranks: Tensor
    sketch: Tensor
    scaling: Tensor
    col_group: Tensor | None

    def __init__(
        self,
        shape: Sequence[int],
        ranks: Sequence[int],
        scaling: float,
        *,
        group_size: int = 1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        *stack, rows, cols = shape
        rho, labels = max(ranks), label_dtype(len(ranks))
        self.stack, self.block_ranks, self.group_size = tuple(stack), tuple(ranks), group_size
        self.shard: LayerShard | None = None
        self._partition: Any = None  # made of the labels in `_made_of`
        self._made_of: tuple[Tensor, ...] = ()
        self._position: Tensor | None = None  # of columns in the order of `col_group`
        self._kept: PackedAdapter | None = None  # of the last call; it holds what the backend made of it
        self.A = nn.Parameter(
            torch.zeros(*stack, rho, granules(cols, group_size), device=device, dtype=dtype)
        )
        self.B = nn.Parameter(torch.zeros(*stack, rows, rho, device=device, dtype=dtype))
        self.register_buffer("row_block", torch.zeros(*stack, rows, device=device, dtype=labels))
        self.register_buffer("col_block", torch.zeros(*stack, cols, device=device, dtype=labels))
        self.register_buffer("ranks", torch.zeros(len(ranks), device=device, dtype=torch.int32))
        self.register_buffer("sketch", torch.zeros(*stack, SKETCH_SIZE, device=device, dtype=torch.float32))
        self.register_buffer("scaling", scaling_tensor(scaling, torch.device("cpu")))
        self.register_buffer("col_group", None)
        self._place_scaling(self.scaling)

    @property
    def num_blocks(self) -> int:
        """K."""
        return len(self.block_ranks)

    @property
    def r(self) -> int:
        """The sum of the blocks' ranks."""
        return sum(self.block_ranks)

    @property
    def has_blocks(self) -> bool:
        """Whether there are labels: computed, assigned or loaded."""
        return bool(self._made_of) or (not self.ranks.is_meta and bool(self.ranks.any()))

    @property
    def partition(self) -> Any:
        """The `BlockPartition` of the weight, of a stack the `ExpertBlocks`; of a shard, that of its part.

        Raises:
            RuntimeError: there are no blocks yet.
        """
        return self._partition if self.is_current() else self.read_labels()

    def is_current(self) -> bool:
        """Whether the partition is that of the labels in the buffers, which loading and moving replace."""
        buffers: Any = self._buffers  # attributes of an nn.Module are slow enough to show in small layers
        made_of = self._made_of
        if not made_of:
            return False
        rows, cols, ranks = made_of
        if buffers["ranks"] is ranks and buffers["row_block"] is rows and buffers["col_block"] is cols:
            # `fully_shard` moves buffers to a GPU in place.
            return bool(self._partition.row_offsets.device == rows.device)
        # These put stand-ins into the buffers.
        recorded = torch.compiler.is_exporting() or torch._C._is_tracing()
        return recorded or torch._C._len_torch_dispatch_stack() > 0

    def read_labels(self) -> Any:
        """Make the partition anew of the labels, and return it."""
        if self.ranks.is_meta or not bool(self.ranks.any()):
            raise RuntimeError(
                "the layer has no blocks yet: load a state dict, its own or that of a plain nn.Linear; "
                "reset_parameters() makes blocks too, and draws a new base weight"
            )
        rows, cols = self.row_block, self.col_block
        # The partition is kept for later calls, so it holds inference tensors only if the labels are.
        with torch.inference_mode(rows.is_inference()):
            self.block_ranks = tuple(self.ranks.tolist())
            if self.shard is not None:
                rows, cols = rows[self.shard.rows], cols[self.shard.cols]
            kind: Any = ExpertBlocks if self.stack else BlockPartition
            self._keep_partition(kind.from_labels(rows, cols, self.num_blocks))
        return self._partition

    def _keep_partition(self, partition: Any) -> None:
        self._partition, self._kept = partition, None
        self._made_of = self.row_block, self.col_block, self.ranks
        self._position = group_position(self.col_group)

    def share(self, partition: Any) -> None:
        """Take an equal partition, which another adapter holds, in place of its own."""
        self._partition, self._kept = partition, None

    def cut(self, shard: LayerShard) -> None:
        """Become the adapter of one part of the weight; A and B are `DTensor` from now on."""
        self.shard, known, self._made_of = shard, bool(self._made_of), ()
        if known:
            self.read_labels()

    @torch.no_grad()
    def set_blocks(
        self, partition: Any, sketch: Tensor | None = None, ranks: Sequence[int] | None = None
    ) -> None:
        """Take blocks that were computed, and store their labels.

        Args:
            partition: of the whole weight: `BlockPartition`, of a stack `ExpertBlocks`.
            sketch: of W0; stays as it is where None.
            ranks: rank of each block; `block_ranks` where None.
        """
        parts = partition.partitions(range(*self.stack)) if self.stack else [partition]
        sides = "row_block", "col_block"
        values = {side: torch.stack([getattr(part, side) for part in parts]) for side in sides}
        self.block_ranks = tuple(self.block_ranks if ranks is None else ranks)
        values["ranks"] = torch.tensor(self.block_ranks, dtype=torch.int32)
        if sketch is not None:
            values["sketch"] = sketch
        with torch.inference_mode(self.ranks.is_inference()):
            for key, value in values.items():
                held = getattr(self, key)
                if held.is_meta:
                    setattr(self, key, value.view(held.shape).to(partition.device, held.dtype))
                else:  # a state dict that was begun, and a CUDA graph, refer to these tensors
                    held.copy_(value.view(held.shape))
        if self.shard is not None or partition.device != self.ranks.device:
            self.read_labels()
        else:
            self._keep_partition(partition)

    def set_groups(self, col_group: Tensor | None) -> None:
        """Take the group of each column, before blocks are set."""
        held = self.ranks.device
        self.col_group = None if col_group is None else col_group.to(held, torch.int32, copy=True)

    @torch.no_grad()
    def reset(self, *, zero: bool = True) -> None:
        """Draw A_k uniform in ±1/√C_k (Kaiming, a=√5); set B to zero, or draw it where not `zero`."""
        for A, B, part in zip(self._each(self.A), self._each(self.B), self.partitions(), strict=True):
            draw_A(A, part, self.ranks, self.group_size, self.col_group)
            B.zero_()
            if not zero:
                B.normal_().mul_(padding_masks(part, self.ranks, B.shape[-1])[1])

    def partitions(self) -> Sequence[BlockPartition]:
        """The blocks of each weight of the stack."""
        return self.partition.partitions(range(*self.stack)) if self.stack else [self.partition]

    @property
    def num_parameters(self) -> int:
        """The trained parameters, `Σ r_k (N_k + C_k / g)` over all weights, without padding."""
        partitions = self.partitions()
        return sum(trainable_parameters(part, self.block_ranks, self.group_size) for part in partitions)

    def _each(self, tensor: Tensor) -> Sequence[Tensor]:
        return tensor.unbind() if self.stack else (tensor,)

    def packed(self, weight: Tensor, *, keep: bool = False) -> PackedAdapter:
        """Pair the adapter with W0 (N, C), or with this process's part of it; autograd sees the factors.

        Args:
            weight: W0.
            keep: whether W0 lives on after the call. The pair is then kept, with what a backend made of it, until one
                of its tensors is another object.
        """
        buffers: Any = self._buffers
        A, B, place = parameter(self, "A"), parameter(self, "B"), ORIGIN
        if self.shard is not None:
            A, B, place = self.shard.local(A), self.shard.local(B), self.shard.place
        partition = self._partition if self.is_current() else self.read_labels()
        if self.group_size > 1:
            A = of_columns(A, self.group_size, partition.shape[1], self._position)
        ranks, s = buffers["ranks"], buffers["scaling"]
        # A graph would depend on what is kept.
        kept = None if torch.compiler.is_dynamo_compiling() else self._kept
        if kept is None or not kept.is_of(weight, A, B, ranks, s):
            kept = PackedAdapter(weight, A, B, partition, ranks.contiguous(), s, self.block_ranks, place)
            # A kept adapter keeps its tensors alive: none that is computed for this call alone.
            if keep and {*map(type, (weight, A, B))} == {nn.Parameter} and not is_observed(weight, A, B):
                self._kept = kept
        return kept

    def forward(self, weight: Tensor) -> PackedAdapter:
        """:meth:`packed`, with the hooks of modules: accelerate's load offloaded factors."""
        return self.packed(weight)

    @torch.no_grad()
    def overwrite(self, given: Mapping[str, Tensor]) -> None:
        """Copy the tensors of an adapter of the same shapes and groups, by `STATE_KEYS`, over its own, in place."""
        before, position = self.partition if self.has_blocks else None, self._position
        for key in STATE_KEYS:
            getattr(self, key).copy_(given[key])
        if before == self.read_labels():
            self.share(before)  # a CUDA graph that a user captured reads its tensors
            self._position = position

    def check_state(self, name: str, given: Mapping[str, Any], *, assign: bool = True) -> None:
        """Raise unless tensors that are about to be loaded are complete, of the adapter's shapes and in range.

        Args:
            name: the layer's, for messages.
            given: tensors by `ALL_KEYS`, None for a missing tensor.
            assign: whether they become the adapter's, rather than their values.

        Raises:
            TypeError, ValueError: naming the layer and the tensor.
            RuntimeError: the adapter is on the meta device and would take values only.
        """
        check_complete(name, given)
        for key in STATE_KEYS:
            check_like(f"{name}.{key}", given[key], getattr(self, key), meta=key == "scaling")
        if self.ranks.is_meta and not assign:
            raise RuntimeError(
                f"{name} is on the meta device: load with assign=True, or call to_empty() first"
            )
        if not given["ranks"].is_meta:
            check_values(name, given, self.r, max(self.block_ranks), self.group_size)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # accelerate, where only the first process has the weights, sends those that are DTensors on the meta device.
        if self.A.is_meta and hasattr(self.A, "device_mesh"):
            from torch.distributed.tensor import DTensor

            for key, buffer in self.named_buffers():
                destination[prefix + key] = DTensor.from_local(buffer, self.A.device_mesh)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        for key in self._buffers:
            if (local := getattr(state_dict.get(prefix + key), "to_local", None)) is not None:
                state_dict[prefix + key] = local()
        given = {key: state_dict.get(prefix + key) for key in ALL_KEYS}
        if all(value is None for value in given.values()):
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
            return
        assign = bool(local_metadata.get("assign_to_params_buffers"))
        self.check_state(prefix.rstrip(".") or "the adapter", given, assign=assign)
        if (groups := given["col_group"]) is None or self.col_group is None:
            self.col_group = None if groups is None else torch.empty_like(self.col_block, dtype=torch.int32)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        self._place_scaling(self.scaling)
        self._made_of = ()
        if not self.ranks.is_meta:
            self.read_labels()  # now, because the next forward may be compiled

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        labels, sketch, s = (self.row_block, self.col_block, self.ranks), self.sketch, self.scaling
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self._kept = None
        self._place_scaling(s)  # as it was: a cast rounds buffers, to_empty() discards their values
        if not (self.sketch.is_meta or sketch.is_meta):
            self.sketch = sketch.to(self.sketch.device)
        now = self.row_block, self.col_block, self.ranks
        if any(new is not old for new, old in zip(now, labels, strict=True)):
            known, self._made_of = bool(self._made_of), ()
            if self.ranks.is_meta:
                return self
            # to_empty() leaves arbitrary numbers. Ranks of zero say that there are no blocks until a state dict brings
            # some.
            if labels[2].is_meta or not all(map(torch.equal, map(Tensor.cpu, now), map(Tensor.cpu, labels))):
                self.ranks.zero_()
            elif known:
                self.read_labels()
        return self

    def _place_scaling(self, s: Tensor) -> None:
        device = self.ranks.device
        self.scaling = s if device.type == "meta" else scaling_tensor(s, device)

    def extra_repr(self) -> str:
        """Show the shape of the weight, r and K."""
        shape = (*self.stack, self.B.shape[-2], self.col_block.shape[-1])
        groups = f", group_size={self.group_size}" if self.group_size > 1 else ""
        return f"shape={shape}, r={self.r}, num_blocks={self.num_blocks}{groups}"


def check_complete(name: str, given: Mapping[str, Any]) -> None:
    """Raise unless all tensors of an adapter, by `STATE_KEYS`, are given."""
    missing = [key for key in STATE_KEYS if given.get(key) is None]
    if missing:
        raise ValueError(f"{name}: the adapter lacks {', '.join(missing)}; nothing was loaded")


def check_values(name: str, given: Mapping[str, Tensor], r: int, rho: int, group_size: int) -> None:
    """Raise unless the labels, ranks and scale in tensors of fitting shapes are in range.

    Args:
        name: the layer's, for messages.
        given: tensors by `ALL_KEYS`.
        r: the sum of the ranks.
        rho: the largest of them.
        group_size: how many columns share one of A, and so are in one block.
    """
    ranks = given["ranks"].tolist()
    if min(ranks) < 0 or max(ranks) != rho or sum(ranks) != r:
        raise ValueError(f"{name}: ranks must sum to r={r} with a largest rank of {rho}, got {ranks}")
    for key in ("row_block", "col_block"):
        check_range(f"{name}.{key}", given[key], len(ranks))
    if (groups := given.get("col_group")) is not None:
        check_map(f"{name}.col_group", groups, given["col_block"].shape, group_size)
    check_groups(f"{name}.col_block", given["col_block"], group_size, groups)
    if not given["scaling"].is_meta:
        check_finite(f"{name}.scaling", float(given["scaling"]))
