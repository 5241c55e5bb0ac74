"""`FusedSMoALinear`: an `nn.Linear` with an SMoA adapter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backends import eager, load_backend, resolve_backend
from .checks import check_finite, check_weight
from .definition.arguments import check_input
from .definition.block_rule import BlockRule
from .definition.packed import PackedAdapter, draw_A, scaling_tensor
from .definition.partition import BlockPartition, label_dtype
from .definition.ranks import trainable_parameters
from .definition.shard import LayerShard
from .definition.sketch import SKETCH_SIZE, sketch_weight
from .definition.spectral_order import whole
from .functional import smoa_linear
from .layer_checks import (
    LABELS,
    Settings,
    check_base,
    check_fit,
    check_keys,
    check_linear,
    check_tensors,
    linear_parameters,
    partition_in,
)

__all__ = ["FusedSMoALinear"]

# The buffers that hold the partition, in the order of `BlockPartition.tensors`.
_PARTITION = tuple(
    f"smoa_{name}"
    for name in ("row_block", "col_block", "row_index", "col_index", "row_offsets", "col_offsets")
)


class FusedSMoALinear(nn.Linear):
    """A linear layer with an SMoA adapter: `y = x W0ᵀ + b + dropout(x) ΔWᵀ`.

    W0 and b are frozen. `smoa_A` (ρ, in_features) and `smoa_B` (out_features, ρ) train. The state dict also holds the
    block labels, the ranks and a sketch of W0. So loading an adapter never recomputes the labels, and loading one that
    was trained over another base weight warns. Loading a plain Linear's state dict (a weight without labels) computes
    a new partition, and warns.

    Args:
        in_features: C.
        out_features: N.
        bias: whether the base layer has a bias.
        r: the rank budget, shared by all blocks; at least 1.
        num_blocks: K, from 1 (which is HiRA) to min(N, C).
        alpha: the update is scaled by alpha / r. Where alpha is None it is r, and the scale is 1.
        dropout: probability that an element of the adapter's input is dropped in training.
        block_ranks: the rank of each block, K numbers that sum to r; where None, r is shared evenly.
        block_order: the order in which rows and columns are cut into blocks: "spectral" is the paper's. "contiguous"
            (W0's own) and "random" need no spectrum.
        granule: adjacent rows or columns that stay together, as many as this; 1 is the paper's.
        block_seed: draws the order where `block_order` is "random".
        algorithm: how the layer is computed; see :func:`smoa_kernels.smoa_linear`.
        backend: what computes it; see :func:`smoa_kernels.smoa_linear`.
        strict_base: raise an error, instead of a warning, for an adapter that was trained over another base weight.
        device: device of all tensors.
        dtype: dtype of weight, bias and factors.

    Raises:
        TypeError, ValueError: an argument is wrong; the message says which, what was given and what is allowed.

    Example:
        >>> layer = FusedSMoALinear.from_linear(nn.Linear(8, 6), r=4, num_blocks=2)
        >>> layer(torch.randn(3, 8)).shape
        torch.Size([3, 6])
        >>> [name for name, p in layer.named_parameters() if p.requires_grad]
        ['smoa_A', 'smoa_B']
    """

    smoa_row_block: Tensor
    smoa_col_block: Tensor
    smoa_ranks: Tensor
    smoa_sketch: Tensor
    smoa_scaling: Tensor
    smoa_row_index: Tensor | None  # None until there are labels, as the other indices and offsets
    smoa_base_weight: Tensor | None  # W0 while the layer is merged
    _shard: LayerShard | None = None  # this process's part, under tensor parallelism

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 8,
        num_blocks: int = 2,
        alpha: float | None = None,
        dropout: float = 0.0,
        block_ranks: Sequence[int] | None = None,
        block_order: str = "spectral",
        granule: int = 1,
        block_seed: int = 0,
        algorithm: str = "auto",
        backend: str = "auto",
        strict_base: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_linear(in_features, out_features, bias, device, dtype)
        settings = Settings(
            r=r,
            rule=BlockRule(num_blocks, block_order, granule, block_seed),
            alpha=alpha,
            dropout=dropout,
            block_ranks=block_ranks,
            algorithm=algorithm,
            backend=backend,
            strict_base=strict_base,
        )
        settings.rule.check((out_features, in_features))
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._adapt(settings)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        r: int = 8,
        num_blocks: int = 2,
        alpha: float | None = None,
        dropout: float = 0.0,
        block_ranks: Sequence[int] | None = None,
        block_order: str = "spectral",
        granule: int = 1,
        block_seed: int = 0,
        algorithm: str = "auto",
        backend: str = "auto",
        strict_base: bool = False,
        partition: BlockPartition | None = None,
    ) -> FusedSMoALinear:
        """Adapt an existing layer. Its weight and bias are frozen, and shared rather than copied.

        Args:
            linear: an `nn.Linear`, or a `Conv1D` of transformers, whose (in, out) weight is viewed transposed.
            partition: the blocks of the weight, if they are known; where None, they are computed as `block_order`,
                `granule` and `block_seed` say.

        The other arguments are the constructor's.

        Raises:
            TypeError, ValueError: an argument is wrong; the message says which. `linear` is as it was before.
        """
        weight, bias = linear_parameters(linear)
        settings = Settings(
            r=r,
            rule=BlockRule(num_blocks, block_order, granule, block_seed),
            alpha=alpha,
            dropout=dropout,
            block_ranks=block_ranks,
            algorithm=algorithm,
            backend=backend,
            strict_base=strict_base,
        )
        settings.rule.check(weight.shape)
        if partition is not None:
            check_fit(partition, tuple(weight.shape), num_blocks)
        elif not weight.is_meta:
            # Before anything of `linear` is changed: a weight may have no spectrum.
            partition = settings.rule.build(weight)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.out_features, layer.in_features = weight.shape
        layer.register_parameter("weight", weight)
        layer.register_parameter("bias", bias)
        layer._adapt(settings, partition)
        layer.train(linear.training)
        return layer

    def _adapt(self, settings: Settings, partition: BlockPartition | None = None) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.r, self.block_ranks = settings.r, settings.ranks
        self.num_blocks, self.block_order, self.granule, self.block_seed = settings.rule
        self.alpha = float(settings.r if settings.alpha is None else settings.alpha)
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
        self.register_buffer("smoa_scaling", scaling_tensor(self.alpha / self.r, device), persistent=False)
        self.register_buffer("smoa_base_weight", None, persistent=False)
        for name in ("row_index", "col_index", "row_offsets", "col_offsets"):
            self.register_buffer(f"smoa_{name}", None, persistent=False)
        self._sizes: list[int] = []
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
        if not self._sizes:
            raise RuntimeError(
                "the layer has no blocks yet: load a state dict that holds them, or call reset_parameters()"
            )
        buffers: Any = self._buffers
        tensors = [buffers[name] for name in _PARTITION]
        if self._shard is not None:
            tensors[:2] = tensors[0][self._shard.rows], tensors[1][self._shard.cols]
        return BlockPartition.from_tensors(tensors, self._sizes)

    @partition.setter
    def partition(self, partition: BlockPartition) -> None:
        check_fit(partition, (self.out_features, self.in_features), self.num_blocks)
        partition = partition.to(self.weight.device)
        self.smoa_row_block, self.smoa_col_block = partition.row_block, partition.col_block
        if self._shard is not None:
            partition = partition.shard(self._shard.rows, self._shard.cols)
        for name in ("row_index", "col_index", "row_offsets", "col_offsets"):
            setattr(self, f"smoa_{name}", getattr(partition, name))
        self._sizes = partition.sizes()

    @property
    def scaling(self) -> float:
        """s, the scale of the update. Assigning changes a tensor in place, so a compiled model stays compiled.

        Raises:
            TypeError, ValueError: the assigned value is not a finite number.
            RuntimeError: assigned while the layer is merged or on the meta device.
        """
        return self.alpha / self.r if self.smoa_scaling.is_meta else float(self.smoa_scaling)

    @scaling.setter
    def scaling(self, value: float) -> None:
        check_finite("scaling", value)
        self._check_unmerged("the layer is merged", "assigning scaling")
        self._check_values()
        self.smoa_scaling.fill_(value)

    @property
    def merged(self) -> bool:
        """Whether `weight` holds W_eff, the base weight with the update."""
        return self._buffers["smoa_base_weight"] is not None

    @property
    def num_adapter_parameters(self) -> int:
        """The number of trainable parameters, `Σ r_k (N_k + C_k)`. Padding is not counted.

        Raises:
            RuntimeError: the layer has no blocks yet.
        """
        return trainable_parameters(self.partition, self.block_ranks)

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

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., in_features) -> (..., out_features), in x's dtype.

        Args:
            x: floating point, with any strides and leading dimensions; it may have no tokens.

        Raises:
            TypeError, ValueError: as :func:`smoa_kernels.smoa_linear` does.
        """
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        A: Tensor = self.smoa_A
        B: Tensor = self.smoa_B
        shard = self._shard
        buffers: Any = self._buffers  # nn.Module's attribute access is slow enough to show in small layers
        if shard is not None:
            x, weight, (A, B) = shard.input(x), shard.weight(weight), shard.factors(A, B)
            bias = None if bias is None else shard.bias(bias)
        if buffers["smoa_base_weight"] is not None:
            check_input(x, weight)
            y = F.linear(x, weight, bias)
        else:
            y = smoa_linear(
                x,
                weight,
                bias,
                A,
                B,
                self.partition,
                buffers["smoa_ranks"],
                scaling=buffers["smoa_scaling"],
                dropout_p=self.dropout if self.training else 0.0,
                column_offset=0 if shard is None else shard.column_offset,
                global_in_features=self.in_features,
                block_ranks=self.block_ranks,
                algorithm=self.algorithm,
                backend=self.backend,
            )
        return y if shard is None else shard.output(y)

    def delta_weight(self) -> Tensor:
        """Compute the update ΔW (N, C) in W0's dtype; under tensor parallelism, this process's part of it.

        It is computed by itself, more exactly than the difference of W_eff and W0.

        Raises:
            RuntimeError: the layer is on the meta device, has no blocks yet, or is sharded by `fully_shard`.
        """
        return eager.delta_weight(self._packed())

    @torch.no_grad()
    def merge(self) -> None:
        """Write W_eff into `weight`, so that the layer is as fast as an `nn.Linear`. W0 is kept for :meth:`unmerge`.

        If this is interrupted, `weight` is W0 again, bit for bit. Merging a merged layer warns and changes nothing.

        Raises:
            RuntimeError: the layer is on the meta device, has no blocks yet, or is sharded by `fully_shard`.
            ValueError: `backend` cannot run here.
        """
        if self.merged:
            warnings.warn("already merged: nothing to do", UserWarning, stacklevel=2)
            return
        self._check_whole()
        backend = resolve_backend(self.backend, self.weight.device, self.weight.dtype, self.smoa_A.shape[0])
        weight = self.weight if self._shard is None else self._shard.weight(self.weight)
        self.smoa_base_weight = self.weight.detach().clone()
        try:
            load_backend(backend).modulated_weight(self._packed(), out=weight)
        except BaseException:
            self.unmerge()
            raise

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore W0, bit for bit. Unmerging a layer that is not merged warns and changes nothing."""
        if self.smoa_base_weight is None:
            warnings.warn("not merged: nothing to do", UserWarning, stacklevel=2)
            return
        self.weight.copy_(self.smoa_base_weight)
        self.smoa_base_weight = None

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
            raise RuntimeError("the layer is on the meta device: call to_empty() and load or draw it first")

    def _check_whole(self) -> None:
        self._check_values()
        if self._shard is None and hasattr(self.weight, "full_tensor"):
            raise RuntimeError("weight is sharded by fully_shard: call unshard() on the module first")

    def _packed(self) -> PackedAdapter:
        self._check_whole()
        weight = self.weight if self.smoa_base_weight is None else self.smoa_base_weight
        weight, A, B = weight.detach(), self.smoa_A.detach(), self.smoa_B.detach()
        if self._shard is not None:
            weight, (A, B) = self._shard.weight(weight), self._shard.factors(A, B)
        return PackedAdapter(
            weight, A, B, self.partition, self.smoa_ranks, self.smoa_scaling, self.block_ranks
        )

    def extra_repr(self) -> str:
        """Describe the layer as `nn.Linear` does, with the adapter's settings."""
        return (
            f"{super().extra_repr()}, r={self.r}, num_blocks={self.num_blocks}, block_order={self.block_order!r}, "
            f"granule={self.granule}, alpha={self.alpha:g}, "
            f"dropout={self.dropout}, algorithm={self.algorithm!r}, backend={self.backend!r}"
        )

    def _cut(self, shard: LayerShard) -> None:
        """Compute as one process's part of the layer from now on; its parameters were cut before."""
        self._shard = shard
        self._relabel()

    def _relabel(self) -> None:
        """Recompute what depends on the labels and ranks: the indices, and the sizes that Python holds."""
        if self.smoa_row_index is None:
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedSMoALinear:
        scaling = self.scaling
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        # Restore s: .half() would have rounded it with the other buffers.
        if not self.smoa_scaling.is_meta:
            self.smoa_scaling = scaling_tensor(scaling, self.smoa_scaling.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:  # a state dict always holds W0: with W_eff, loading it would apply the update twice
            destination[prefix + "weight"] = self.smoa_base_weight

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state dict as `nn.Module` does, but all of it or nothing.

        Raises:
            TypeError, ValueError: a tensor is missing, unexpected or does not fit. The message names it.
            RuntimeError: the layer is merged, or on the meta device without `assign`.
        """
        if isinstance(
            state_dict, Mapping
        ):  # here, since _load_from_state_dict is not told whether it is strict
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
            weight = given.get("weight", self.weight)
            if "smoa_sketch" in given and not weight.is_meta:
                check_base(name, weight, given["smoa_sketch"], strict=self.strict_base)
        elif "weight" in given and self._rule.needs_weight:
            check_weight(whole(given["weight"]))  # before it is copied and sorted
        before = len(missing_keys)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if has_labels:
            self.partition = partition
            self.block_ranks = tuple(self.smoa_ranks.tolist())
            if self.smoa_scaling.is_meta:  # it is not in the state dict
                self.smoa_scaling = scaling_tensor(self.alpha / self.r, self.smoa_ranks.device)
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
