"""`FusedSMoALinear`: an `nn.Linear` with an SMoA adapter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backends import eager, load_backend, resolve_backend
from .checks import (
    check_count,
    check_device,
    check_finite,
    check_kind,
    check_weight,
)
from .definition.arguments import check_input
from .definition.dropout import WIDEST
from .definition.packed import PackedAdapter, draw_A, scaling_tensor
from .definition.partition import BlockPartition, label_dtype
from .definition.precision import DTYPES
from .definition.ranks import trainable_parameters
from .definition.sketch import sketch_weight
from .definition.spectral_order import whole
from .functional import smoa_linear
from .layer_checks import (
    LABELS,
    Settings,
    check_base,
    check_fit,
    check_keys,
    check_labels,
    check_tensors,
    linear_parameters,
)

if TYPE_CHECKING:
    from .definition.shard import LayerShard

__all__ = ["FusedSMoALinear"]

# Buffers, in the order of `BlockPartition.tensors`.
_PARTITION = tuple(
    f"smoa_{name}"
    for name in ("row_block", "col_block", "row_index", "col_index", "row_offsets", "col_offsets")
)


class FusedSMoALinear(nn.Linear):
    """Linear layer `y = x W0ᵀ + b + dropout(x) ΔWᵀ` with frozen W0 and b and a trainable SMoA adapter.

    Only `smoa_A` (ρ, in_features) and `smoa_B` (out_features, ρ) train. The block labels, the ranks and a
    sketch of W0 are buffers in the state dict: loading an adapter never recomputes them, and one that was
    trained over another base is noticed. Loading a plain Linear's state dict (weight without labels)
    recomputes the partition and warns.

    Args:
        in_features: C.
        out_features: N.
        bias: whether the base layer has a (frozen) bias.
        r: rank budget over all blocks, at least 1.
        num_blocks: K, from 1 (HiRA) to min(N, C).
        alpha: the update is scaled by alpha / r; r when None.
        dropout: probability of dropping an element of the adapter's input in training.
        block_ranks: rank of each block, K numbers that sum to r; shared evenly when None.
        algorithm: see :func:`smoa_kernels.smoa_linear`.
        backend: likewise.
        strict_base: refuse, rather than warn about, an adapter that was trained over another base.
        device: of the layer.
        dtype: of the layer.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

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
    smoa_row_index: Tensor | None  # None, as its like, while the labels are yet to be loaded
    smoa_base_weight: Tensor | None  # W0 while the layer is merged
    _shard: LayerShard | None = None  # where tensor parallelism has cut W0

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
        algorithm: str = "auto",
        backend: str = "auto",
        strict_base: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            check_count(name, size, 1, WIDEST)
        check_kind("bias", bias, bool)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in DTYPES):
            raise TypeError(f"dtype must be floating point of 16 bits or more, got {dtype}")
        if device is not None:
            check_device(device)
        settings = Settings(
            (out_features, in_features),
            r,
            num_blocks,
            alpha,
            dropout,
            block_ranks,
            algorithm,
            backend,
            strict_base,
        )
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
        algorithm: str = "auto",
        backend: str = "auto",
        strict_base: bool = False,
        partition: BlockPartition | None = None,
    ) -> FusedSMoALinear:
        """Adapt an existing layer; its weight and bias are shared, not copied, and frozen.

        Args:
            linear: `nn.Linear`, or Hugging Face's `Conv1D`, whose (in, out) weight is viewed transposed.
            partition: blocks of the weight where they are already known; computed from its spectrum when None.

        The other arguments are the constructor's.

        Raises:
            TypeError, ValueError: naming the argument; `linear` is as it was.
        """
        weight, bias = linear_parameters(linear)
        settings = Settings(
            tuple(weight.shape), r, num_blocks, alpha, dropout, block_ranks, algorithm, backend, strict_base
        )
        if partition is not None:
            check_fit(partition, tuple(weight.shape), num_blocks)
        elif not weight.is_meta:
            partition = BlockPartition.from_weight(
                weight, num_blocks
            )  # before anything of `linear` is touched
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
        self.r, self.num_blocks, self.alpha = settings.r, settings.num_blocks, settings.alpha
        self.dropout, self.algorithm, self.backend = settings.dropout, settings.algorithm, settings.backend
        self.strict_base = settings.strict_base
        self.block_ranks = settings.block_ranks
        rho, device = max(self.block_ranks), self.weight.device
        self.smoa_A = nn.Parameter(self.weight.new_empty(rho, self.in_features))
        self.smoa_B = nn.Parameter(self.weight.new_empty(self.out_features, rho))
        dtype = label_dtype(self.num_blocks)
        self.register_buffer("smoa_row_block", torch.zeros(self.out_features, dtype=dtype, device=device))
        self.register_buffer("smoa_col_block", torch.zeros(self.in_features, dtype=dtype, device=device))
        self.register_buffer("smoa_ranks", torch.tensor(self.block_ranks, dtype=torch.int32, device=device))
        self.register_buffer("smoa_sketch", torch.zeros(33, device=device))
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
        """Blocks of W0's rows and columns; those of this process's shard under tensor parallelism.

        Raises:
            RuntimeError: there are none yet: the layer was made on the meta device, and nothing was loaded.
            TypeError, ValueError: what is assigned is no partition, or one of another weight or number of blocks.
        """
        if not self._sizes:
            raise RuntimeError(
                "the layer has no blocks yet: load a state dict that holds them, or call reset_parameters()"
            )
        buffers = self._buffers  # nn.Module's own way to them is Python, which small layers feel
        tensors = [cast(Tensor, buffers[name]) for name in _PARTITION]
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
        """s; assigning it changes the factor in place, which recompiles nothing.

        Raises:
            TypeError, ValueError: what is assigned is no finite number.
            RuntimeError: assigned while `weight` holds W_eff, or before the layer has left the meta device.
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
        """Whether `weight` holds W_eff."""
        return self.smoa_base_weight is not None

    @property
    def num_adapter_parameters(self) -> int:
        """`Σ r_k (N_k + C_k)`, padding not counted.

        Raises:
            RuntimeError: as :attr:`partition` does.
        """
        return trainable_parameters(self.partition, self.block_ranks)

    def reset_parameters(self) -> None:
        """Draw a new base layer as `nn.Linear` does and, once the layer is built, a new adapter over it.

        Raises:
            RuntimeError: the layer is merged, on the meta device, or cut by tensor parallelism; nothing was drawn.
        """
        if hasattr(self, "smoa_A"):
            self._check_can_draw("reset_parameters()")
        super().reset_parameters()
        if hasattr(self, "smoa_A"):
            self.weight.requires_grad_(False)
            self.smoa_ranks = torch.tensor(self.block_ranks, dtype=torch.int32, device=self.weight.device)
            self._set_base(None)
            self.reset_adapter()

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """A_k uniform in ±1/√C_k (Kaiming, a=√5), B zero: the layer computes what its base computes.

        Raises:
            RuntimeError: tensor parallelism has cut the layer, it is merged, or on the meta device; nothing was drawn.
        """
        self._check_can_draw("reset_adapter()")
        draw_A(self.smoa_A, self.partition, self.smoa_ranks)
        self.smoa_B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in x's dtype.

        Args:
            x: floating point, any strides and leading dimensions, zero tokens included.

        Raises:
            TypeError, ValueError: as :func:`smoa_kernels.smoa_linear` does.
        """
        weight, bias = self.weight, cast("Tensor | None", self.bias)
        A, B = cast(Tensor, self.smoa_A), cast(Tensor, self.smoa_B)
        shard = self._shard
        if shard is not None:
            x, weight, (A, B) = shard.input(x), shard.weight(weight), shard.factors(A, B)
            bias = None if bias is None else shard.bias(bias)
        if self.merged:
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
                self.smoa_ranks,
                scaling=self.smoa_scaling,
                dropout_p=self.dropout if self.training else 0.0,
                column_offset=0 if shard is None else shard.column_offset,
                global_in_features=self.in_features,
                block_ranks=self.block_ranks,
                algorithm=self.algorithm,
                backend=self.backend,
            )
        return y if shard is None else shard.output(y)

    def delta_weight(self) -> Tensor:
        """ΔW = W_eff - W0, (N, C), in W0's dtype; rounded on its own, not as a difference. A shard's is its part.

        Raises:
            RuntimeError: the layer is on the meta device or has no blocks yet, or `fully_shard` has W0 in parts.
        """
        return eager.delta_weight(self._packed())

    @torch.no_grad()
    def merge(self) -> None:
        """Put W_eff into `weight`, so that the layer costs what an `nn.Linear` costs; W0 is kept for `unmerge`.

        Whatever interrupts it, `weight` is W0 again, bit for bit. A layer that is merged already stays so, and warns.

        Raises:
            RuntimeError: as :meth:`delta_weight` does.
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
            adapter = self._packed()
            if backend == "triton":  # in place: nothing of W0's size beside W0 and its copy
                load_backend("triton").modulated_weight(adapter, out=weight)
            else:
                weight.copy_(eager.modulated_weight(adapter))
        except BaseException:
            self.unmerge()
            raise

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put W0 back, bit for bit; a layer that is not merged stays as it is, and warns."""
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
        """As `nn.Linear`'s, with the adapter's settings."""
        return (
            f"{super().extra_repr()}, r={self.r}, num_blocks={self.num_blocks}, alpha={self.alpha:g}, "
            f"dropout={self.dropout}, algorithm={self.algorithm!r}, backend={self.backend!r}"
        )

    def _cut(self, shard: LayerShard) -> None:
        """Compute as one part of a layer whose parameters were cut."""
        self._shard = shard
        self._relabel()

    def _relabel(self) -> None:
        """Derive from the labels and ranks what is kept beside them: indices, and the numbers that the host has."""
        if self.smoa_row_index is None:
            return
        labels = self.smoa_row_block, self.smoa_col_block
        self.partition = BlockPartition.from_labels(*labels, self.num_blocks)
        self.block_ranks = tuple(self.smoa_ranks.tolist())

    def _set_base(self, partition: BlockPartition | None) -> None:
        """Take the current weight as the base: its partition (computed unless given) and its sketch."""
        if partition is None:
            partition = BlockPartition.from_weight(self.weight, self.num_blocks)
        self.partition = partition
        self.smoa_sketch = sketch_weight(self.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedSMoALinear:
        scaling = self.scaling
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        # .half() would round s with the other buffers.
        if not self.smoa_scaling.is_meta:
            self.smoa_scaling = scaling_tensor(scaling, self.smoa_scaling.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:  # a state dict is always of W0 and its adapter, or loading it would adapt twice
            destination[prefix + "weight"] = self.smoa_base_weight

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As `nn.Module`'s, but all or nothing.

        Raises:
            TypeError, ValueError: naming the tensor that is missing, left over or does not fit; nothing was loaded.
            RuntimeError: the layer is merged, or on the meta device and `assign` is not set.
        """
        if isinstance(state_dict, Mapping):  # a layer within a module is not told whether the load is strict
            check_keys("FusedSMoALinear", self, state_dict, strict=strict)
        return super().load_state_dict(state_dict, strict, assign)

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
        check_tensors(name, self, given)
        if has_labels:
            if self.smoa_ranks.is_meta and not local_metadata.get("assign_to_params_buffers"):
                raise RuntimeError(
                    f"{name} is on the meta device: load with assign=True, or call to_empty() first"
                )
            partition = check_labels(name, self, given)
            check_base(name, self, given)
        elif "weight" in given:
            check_weight(whole(given["weight"]))  # whose spectrum is asked for once it is copied
        before = len(missing_keys)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if has_labels:
            self.partition = partition
            self.block_ranks = tuple(self.smoa_ranks.tolist())
            if self.smoa_scaling.is_meta:  # which no state dict holds
                self.smoa_scaling = scaling_tensor(self.alpha / self.r, self.smoa_ranks.device)
            if "smoa_sketch" not in given and "weight" in given:
                self.smoa_sketch = sketch_weight(self.weight)
        elif "weight" in given and not error_msgs:
            warnings.warn(
                f"{name}: the state dict holds a weight without block labels, as a plain nn.Linear's does; the "
                "spectral partition was recomputed from it and the adapter kept as it was",
                UserWarning,
                stacklevel=2,
            )
            self._set_base(None)
            # Labels were recomputed and the factors kept: neither is missing.
            missing_keys[before:] = [key for key in missing_keys[before:] if ".smoa_" not in f".{key}"]
