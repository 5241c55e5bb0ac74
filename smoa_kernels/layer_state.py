"""The tensors of a `FusedSMoALinear`: how they are made and labelled, cast, cut, saved and loaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_finite, check_weight
from .definition.block_rule import BlockRule
from .definition.labels import label_dtype
from .definition.packed import PackedAdapter, draw_A, scaling_tensor
from .definition.partition import BlockPartition
from .definition.shard import LayerShard
from .definition.sketch import SKETCH_SIZE, check_base, sketch_distance, sketch_weight
from .definition.spectral_order import whole
from .layer_checks import LABELS, Settings, call_always, check_fit, check_keys, check_tensors, partition_in


class AdapterState(nn.Linear):
    """A linear layer that holds an adapter's tensors beside its own. `FusedSMoALinear` computes with them."""

    smoa_row_block: Tensor
    smoa_col_block: Tensor
    smoa_ranks: Tensor
    smoa_sketch: Tensor
    smoa_scaling: Tensor  # s; never on the meta device
    _stored_base: Tensor | None = None  # W0 while the layer is merged, in the CPU's memory
    _shard: LayerShard | None = None  # this process's part, under tensor parallelism
    _partition: BlockPartition | None = None  # of this part; None until there are labels
    _labels: tuple[Tensor | None, Tensor | None] = None, None  # the buffers that the partition was made of
    _kept: PackedAdapter | None = None  # of the last call; it holds what the backend made of it

    def _adapt(self, settings: Settings, partition: BlockPartition | None = None) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.r, self.block_ranks = settings.r, settings.ranks
        self.num_blocks, self.block_order, self.granule, self.block_seed = settings.rule
        self.dropout, self.strict_base = settings.dropout, settings.strict_base
        self.algorithm, self.backend = settings.algorithm, settings.backend
        rho, device = max(self.block_ranks), self.weight.device
        self.smoa_A = nn.Parameter(self.weight.new_empty(rho, self.in_features))
        self.smoa_B = nn.Parameter(self.weight.new_empty(self.out_features, rho))
        dtype = label_dtype(self.num_blocks)
        self.register_buffer("smoa_row_block", torch.zeros(self.out_features, dtype=dtype, device=device))
        self.register_buffer("smoa_col_block", torch.zeros(self.in_features, dtype=dtype, device=device))
        self.register_buffer("smoa_ranks", torch.tensor(self.block_ranks, dtype=torch.int32, device=device))
        self.register_buffer("smoa_sketch", torch.zeros(SKETCH_SIZE, device=device))
        s = (self.r if settings.alpha is None else settings.alpha) / self.r
        self.register_buffer("smoa_scaling", scaling_tensor(s, torch.device("cpu")))
        self._place_scaling(self.smoa_scaling)
        call_always(self)
        if not self.weight.is_meta:
            self._set_base(partition)
            self.reset_adapter()

    @property
    def partition(self) -> BlockPartition:
        """The blocks of W0's rows and columns; under tensor parallelism, of this process's rows and columns.

        Raises:
            RuntimeError: the layer has no blocks yet: it was made on the meta device, and nothing was loaded.
            TypeError, ValueError: the assigned value is not a partition, or does not fit the weight and `num_blocks`.
        """
        if self._partition is None:
            raise RuntimeError(
                "the layer has no blocks yet: load a state dict, its own or that of a plain nn.Linear; "
                "reset_parameters() makes blocks too, and draws a new base weight"
            )
        return self._partition

    @partition.setter
    def partition(self, partition: BlockPartition) -> None:
        check_fit(partition, (self.out_features, self.in_features), self.num_blocks)
        partition = partition.to(self.weight.device)
        # Loading writes to the buffers, and others may share the partition.
        self.smoa_row_block, self.smoa_col_block = partition.row_block.clone(), partition.col_block.clone()
        self._labels = self.smoa_row_block, self.smoa_col_block
        if self._shard is not None:
            partition = partition.shard(self._shard.rows, self._shard.cols)
        self._partition, self._kept = partition, None

    def _has_own_labels(self) -> bool:
        """Whether the partition is of the labels in the buffers: `torch.func.functional_call` may put others there."""
        buffers: Any = self._buffers
        rows, cols = self._labels
        row_block, col_block = buffers["smoa_row_block"], buffers["smoa_col_block"]
        if row_block is rows and col_block is cols:
            return True
        if torch.compiler.is_exporting() or torch._C._is_tracing() or torch._C._len_torch_dispatch_stack():
            return True  # these put stand-ins there
        if torch._C._are_functorch_transforms_active() or rows is None or cols is None:
            return False
        return torch.equal(row_block.cpu(), rows.cpu()) and torch.equal(col_block.cpu(), cols.cpu())

    @property
    def scaling(self) -> float:
        """s, the scale of the update. Assigning changes a tensor in place, so a compiled model stays compiled.

        Raises:
            TypeError, ValueError: the assigned value is not a finite number.
            RuntimeError: assigned while the layer is merged or on the meta device.
        """
        return float(self.smoa_scaling)

    @scaling.setter
    def scaling(self, value: float) -> None:
        check_finite("scaling", value)
        self._check_unmerged("the layer is merged", "assigning scaling")
        self._check_values()
        self.smoa_scaling.fill_(value)

    @property
    def alpha(self) -> float:
        """s · r. Assigning it assigns `scaling`, with the same errors."""
        return self.scaling * self.r

    @alpha.setter
    def alpha(self, value: float) -> None:
        check_finite("alpha", value)
        self.scaling = value / self.r

    @property
    def merged(self) -> bool:
        """Whether `weight` holds W_eff, the base weight with the update."""
        return self._stored_base is not None

    def reset_parameters(self) -> None:
        """Draw a new base layer, as `nn.Linear` does, and a new adapter for it.

        Raises:
            RuntimeError: the layer is merged, on the meta device, or cut by tensor parallelism; nothing was changed.
        """
        if hasattr(self, "smoa_A"):  # not while nn.Linear's constructor calls this
            self._check_can_draw("reset_parameters()")
        super().reset_parameters()
        if hasattr(self, "smoa_A"):
            self.weight.requires_grad_(False)
            self.smoa_ranks = torch.tensor(self.block_ranks, dtype=torch.int32, device=self.weight.device)
            self._set_base(None)
            self.reset_adapter()

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Restart the adapter: A_k uniform in ±1/√C_k (Kaiming, a=√5), B zero, so that the update is zero.

        Raises:
            RuntimeError: the layer is merged, on the meta device, or cut by tensor parallelism; nothing was changed.
        """
        self._check_can_draw("reset_adapter()")
        draw_A(self.smoa_A, self.partition, self.smoa_ranks)
        self.smoa_B.zero_()

    def _check_unmerged(self, what: str, before: str) -> None:
        if self.merged:
            raise RuntimeError(f"{what}: call unmerge() before {before}")

    def _check_can_draw(self, caller: str) -> None:
        if self._shard is not None:
            raise RuntimeError(f"the layer is sharded: call {caller} before parallelize_module")
        self._check_unmerged("the layer is merged", caller)
        self._check_values()

    def _check_values(self) -> None:
        if self.smoa_A.is_meta:
            raise RuntimeError(
                "the layer is on the meta device: call to_empty(device=...), then load_state_dict(), or "
                "reset_parameters(), which draws a new base weight too"
            )

    def _cut(self, shard: LayerShard) -> None:
        """Compute as one process's part of the layer from now on; its parameters were cut before."""
        self._shard = shard
        self._relabel()

    def _relabel(self) -> None:
        """Recompute the indices, and the sizes that Python holds, from the labels and ranks."""
        if self._partition is None:
            return
        labels = self.smoa_row_block, self.smoa_col_block
        self.partition = BlockPartition.from_labels(*labels, self.num_blocks)
        self.block_ranks = tuple(self.smoa_ranks.tolist())

    @property
    def _rule(self) -> BlockRule:
        return BlockRule(self.num_blocks, self.block_order, self.granule, self.block_seed)

    def _set_base(self, partition: BlockPartition | None) -> None:
        """Take the current weight as the base: store its sketch and its partition, which is computed if None."""
        if partition is None:
            partition = self._rule.build(self.weight)
        self.partition = partition
        self.smoa_sketch = sketch_weight(self.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterState:
        s = self.smoa_scaling
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self._place_scaling(s)  # as it was: half() rounds the buffers, to_empty() discards their values
        self._kept, device = None, self.smoa_ranks.device
        if self._partition is not None and self._partition.device != device:
            # Of meta tensors nothing is left: a state dict brings the labels.
            self._partition = None if self._partition.plan.is_meta else self._partition.to(device)
        self._labels = self.smoa_row_block, self.smoa_col_block
        return self

    def _place_scaling(self, s: Tensor) -> None:
        device = self.smoa_ranks.device
        self.smoa_scaling = s if device.type == "meta" else scaling_tensor(s, device)

    @property
    def _base(self) -> Tensor:
        """W0, never W_eff."""
        weight = self.weight.detach()
        return weight if self._stored_base is None else self._stored_base.to(weight.device, weight.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:  # a state dict always holds W0: with W_eff, loading it would apply the update twice
            destination[prefix + "weight"] = self._base

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state dict as `nn.Module` does, but all of it or nothing.

        Raises:
            TypeError, ValueError: a tensor is missing, unexpected or does not fit. The message names it.
            RuntimeError: the layer is merged, or on the meta device without `assign`.
        """
        # Here, since _load_from_state_dict is not told whether it is strict.
        if isinstance(state_dict, Mapping):
            check_keys("FusedSMoALinear", self._own_tensors(), state_dict, strict=strict)
        return super().load_state_dict(state_dict, strict, assign)

    def _own_tensors(self) -> dict[str, Tensor]:
        """The tensors of the layer's state dict; `state_dict()` would also run the hooks of wrappers such as FSDP."""
        buffers = self.named_buffers(recurse=False)
        kept = {key: buffer for key, buffer in buffers if key not in self._non_persistent_buffers_set}
        return {**dict(self.named_parameters(recurse=False)), **kept}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        name = prefix.rstrip(".") or "FusedSMoALinear"
        has_labels = any(key in given for key in LABELS)
        self._check_unmerged(f"{name} is merged", "loading a state dict")
        check_tensors(name, self._own_tensors(), given)
        if has_labels:
            if self.smoa_ranks.is_meta and not local_metadata.get("assign_to_params_buffers"):
                raise RuntimeError(
                    f"{name} is on the meta device: load with assign=True, or call to_empty() first"
                )
            partition = partition_in(
                name, given, r=self.r, num_blocks=self.num_blocks, max_rank=self.smoa_A.shape[0]
            )
            s = given.get("smoa_scaling")
            if s is not None and not s.is_meta:
                check_finite(f"{name}.smoa_scaling", float(s))
            weight = given.get("weight", self.weight)
            if "smoa_sketch" in given and not weight.is_meta:
                distance = sketch_distance(given["smoa_sketch"], sketch_weight(weight))
                check_base({name: distance}, strict=self.strict_base)
        elif "weight" in given and self._rule.needs_weight:
            check_weight(whole(given["weight"]))  # before it is copied and sorted
        before = len(missing_keys)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if has_labels:
            self.partition = partition
            self.block_ranks = tuple(self.smoa_ranks.tolist())
            self._place_scaling(self.smoa_scaling)
            if "smoa_sketch" not in given and "weight" in given:
                self.smoa_sketch = sketch_weight(self.weight)
        elif "weight" in given and not error_msgs:
            warnings.warn(
                f"{name}: the state dict holds a weight without block labels, as a plain nn.Linear's does; the "
                f"{self.block_order} partition was recomputed and the adapter kept as it was",
                UserWarning,
                stacklevel=2,
            )
            self._set_base(None)
            # Neither is missing: the labels were recomputed, and the factors kept.
            missing_keys[before:] = [key for key in missing_keys[before:] if ".smoa_" not in f".{key}"]
