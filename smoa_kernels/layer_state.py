"""The state of a layer with an adapter: the adapter and W0, their settings, how they are merged, saved and loaded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from .adapter import LABELS, STATE_KEYS, Adapter
from .backends import load_backend, resolve_backend
from .checks import check_finite, check_kind, check_like, check_weight
from .definition.block_rule import BlockRule
from .definition.packed import PackedAdapter
from .definition.partition import BlockPartition
from .definition.ranks import alpha_for_lora_rate
from .definition.shard import FULLY_SHARDED, LayerShard
from .definition.sketch import check_base, sketch_distance, sketch_weight
from .definition.spectral_order import gather_weight
from .functional import dense_update
from .layer_checks import LayerSettings, call_always, check_fit, check_keys, matrix_shape, plain_parameters


class AdaptedWeight(nn.Module):
    """A layer that holds an adapter of its weight W0, a matrix (N, C) or of a convolution (N, C', k, …), C = C'·k·….

    It stands before the plain layer's class among the bases of `FusedSMoALinear` and others, which compute with both.
    """

    smoa: Adapter
    weight: Any  # its declarations differ among torch's layers
    bias: Any
    _stored_base: Tensor | None = None  # W0 while the layer is merged, in the CPU's memory

    @classmethod
    def _over(
        cls,
        name: str,
        base: nn.Module,
        *,
        partition: BlockPartition | None = None,
        use_lora_rate: bool = False,
        **given: Any,
    ) -> Any:
        """Adapt a plain layer, the argument `name`; nothing of it is changed before all was checked."""
        plain = cls.__mro__[cls.__mro__.index(AdaptedWeight) + 1]  # torch's class, the base after this one
        settings, (weight, bias) = LayerSettings(**given), plain_parameters(name, base, plain)
        settings.rule.check(as_matrix(weight).shape)
        check_kind("use_lora_rate", use_lora_rate, bool)
        if use_lora_rate:
            alpha = float(settings.r if settings.alpha is None else settings.alpha)
            sketch, blocks = sketch_weight(as_matrix(weight)), settings.rule.num_blocks
            settings = replace(settings, alpha=alpha_for_lora_rate(alpha, blocks, sketch, weight.numel()))
        if partition is not None:
            check_fit(partition, tuple(as_matrix(weight).shape), settings.num_blocks, settings.group_size)
        elif not weight.is_meta:
            partition = settings.rule.build(as_matrix(weight))  # a weight may have no spectrum
        layer: Any = cls.__new__(cls)
        nn.Module.__init__(layer)
        if isinstance(layer, nn.Linear):  # a Conv1D has other names
            layer.out_features, layer.in_features = weight.shape
        names = {*getattr(base, "__constants__", ()), "transposed", "_reversed_padding_repeated_twice"}
        for name in names & vars(base).keys():
            setattr(layer, name, getattr(base, name))
        layer.register_parameter("weight", weight)
        layer.register_parameter("bias", bias)
        layer._adapt(settings, partition)
        layer.train(base.training)
        return layer

    def _adapt(self, settings: LayerSettings, partition: BlockPartition | None = None) -> None:
        self.weight.requires_grad_(False)
        if getattr(self, "bias", None) is not None:  # an embedding has none
            self.bias.requires_grad_(False)
        self.r = settings.r
        rule = settings.rule
        self.num_blocks, self.block_order, self.granule, self.block_seed, self.group_size = rule
        self.dropout, self.strict_base = settings.dropout, settings.strict_base
        self.algorithm, self.backend = settings.algorithm, settings.backend
        given = matrix_shape(self), settings.ranks, settings.scaling
        weight = self.weight
        self.smoa = Adapter(*given, group_size=self.group_size, device=weight.device, dtype=weight.dtype)
        call_always(self.smoa)  # no call of the layer runs this hook
        if not self.weight.is_meta:
            self._set_base(partition)
            self.smoa.reset()

    def _set_base(self, partition: BlockPartition | None) -> None:
        """Take the current weight as the base: store its sketch and its blocks, which are computed if None."""
        if partition is None:
            partition = self._rule.build(as_matrix(self.weight))
        self.smoa.set_blocks(partition.to(self.weight.device), sketch_weight(as_matrix(self.weight)))

    @property
    def _rule(self) -> BlockRule:
        return BlockRule(self.num_blocks, self.block_order, self.granule, self.block_seed, self.group_size)

    @property
    def _shard(self) -> LayerShard | None:
        return self.smoa.shard

    def _cut(self, shard: LayerShard) -> None:
        self.smoa.cut(shard)

    @property
    def partition(self) -> BlockPartition:
        """The blocks of W0's rows and columns; under tensor parallelism, of this process's rows and columns.

        Raises:
            RuntimeError: the layer has no blocks yet: it was made on the meta device, and nothing was loaded.
            TypeError, ValueError: the assigned value is not a partition, or does not fit the weight and `num_blocks`.
        """
        partition: BlockPartition = self.smoa.partition
        return partition

    @partition.setter
    def partition(self, partition: BlockPartition) -> None:
        check_fit(partition, matrix_shape(self), self.num_blocks, self.group_size)
        self.smoa.set_blocks(partition.to(self.weight.device))

    @property
    def block_ranks(self) -> tuple[int, ...]:
        """The rank of each block."""
        return self.smoa.block_ranks

    @property
    def scaling(self) -> float:
        """s, the scale of the update. Assigning changes a tensor in place, so a compiled model stays compiled.

        Raises:
            TypeError, ValueError: the assigned value is not a finite number.
            RuntimeError: assigned while the layer is merged or on the meta device.
        """
        return float(self.smoa.scaling)

    @scaling.setter
    def scaling(self, value: float) -> None:
        check_finite("scaling", value)
        self._check_unmerged("the layer is merged", "assigning scaling")
        self._check_values()
        self.smoa.scaling.fill_(value)

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
        """Draw a new base layer, as the plain one does, and a new adapter for it.

        Raises:
            RuntimeError: the layer is merged, on the meta device, or cut by tensor parallelism; nothing was changed.
        """
        if not hasattr(self, "smoa"):  # the plain layer's constructor calls this
            self._draw_base()
            return
        self._check_can_draw("reset_parameters()")
        self._draw_base()
        self.weight.requires_grad_(False)
        self._set_base(None)
        self.smoa.reset()

    def _draw_base(self) -> None:
        plain: Any = super()
        plain.reset_parameters()

    def reset_adapter(self) -> None:
        """Restart the adapter: A_k uniform in ±1/√C_k (Kaiming, a=√5), B zero, so that the update is zero.

        Raises:
            RuntimeError: the layer is merged, on the meta device, or cut by tensor parallelism; nothing was changed.
        """
        self._check_can_draw("reset_adapter()")
        self.smoa.reset()

    def _check_unmerged(self, what: str, before: str) -> None:
        if self.merged:
            raise RuntimeError(f"{what}: call unmerge() before {before}")

    def _check_can_draw(self, caller: str) -> None:
        if self._shard is not None:
            raise RuntimeError(f"the layer is sharded: call {caller} before parallelize_module")
        self._check_unmerged("the layer is merged", caller)
        self._check_values()

    def _check_values(self) -> None:
        if self.smoa.A.is_meta:
            raise RuntimeError(
                "the layer is on the meta device: call to_empty(device=...), then load_state_dict(), or "
                "reset_parameters(), which draws a new base weight too"
            )

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
            check_keys(type(self).__name__, self._own_tensors(), state_dict, strict=strict)
        return super().load_state_dict(state_dict, strict, assign)

    def _own_tensors(self) -> dict[str, Tensor]:
        """The tensors of the layer's state dict; `state_dict()` would also run the hooks of wrappers such as FSDP."""
        adapter = {f"smoa.{key}": getattr(self.smoa, key) for key in STATE_KEYS}
        return {**dict(self.named_parameters(recurse=False)), **adapter}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """Check all that a state dict holds of the layer; then load the base, after which torch loads the adapter."""
        given = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        name = prefix.rstrip(".") or type(self).__name__
        self._check_unmerged(f"{name} is merged", "loading a state dict")
        for key, own in self._own_tensors().items():
            if key in given:
                check_like(f"{name}.{key}", given[key], own)
        if "smoa.col_group" in given:
            raise ValueError(
                f"{name}.smoa.col_group: {type(self).__name__} takes groups of adjacent columns only. Load this "
                "adapter, whose groups are in act-order, with PEFT"
            )
        adapter = {key: given.get(f"smoa.{key}") for key in STATE_KEYS}
        has_labels = any(adapter[key] is not None for key in LABELS)
        weight, sketch = given.get("weight", self.weight), cast(Tensor, adapter["sketch"])
        if has_labels:
            assign = bool(local_metadata.get("assign_to_params_buffers"))
            self.smoa.check_state(f"{name}.smoa", adapter, assign=assign)
            if not (weight.is_meta or sketch.is_meta):
                check_base(
                    {name: sketch_distance(sketch, sketch_weight(as_matrix(weight)))}, strict=self.strict_base
                )
        elif "weight" in given and self._rule.needs_weight:
            check_weight(as_matrix(gather_weight(weight)))  # before it is copied and sorted
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        error_msgs = args[-1]
        if has_labels or "weight" not in given or error_msgs:
            return
        warnings.warn(
            f"{name}: the state dict holds a weight without block labels, as a plain layer's does; the "
            f"{self.block_order} partition was recomputed and the adapter kept as it was",
            UserWarning,
            stacklevel=2,
        )
        self._set_base(None)
        # Nothing of the adapter is missing: it loads what it holds.
        held = {prefix + key: value for key, value in self._own_tensors().items() if key.startswith("smoa.")}
        state_dict.update({**held, **state_dict})

    def delta_weight(self) -> Tensor:
        """Compute the update ΔW in W0's shape and dtype; under tensor parallelism, this process's part of it.

        It is computed by itself, more exactly than the difference of W_eff and W0.

        Raises:
            RuntimeError: the layer is on the meta device, has no blocks yet, or is sharded by `fully_shard`.
        """
        return self._like_weight(dense_update(self._packed()).to(self.weight.dtype))

    @torch.no_grad()
    def merge(self) -> None:
        """Write W_eff into `weight`, so that the layer is as fast as without an adapter.

        W0 is kept in the CPU's memory for :meth:`unmerge`.

        If this is interrupted, `weight` is W0 again, bit for bit. Merging a merged layer warns and changes nothing.

        Raises:
            RuntimeError: the layer is on the meta device, has no blocks yet, or is sharded by `fully_shard`.
            ValueError: `backend` cannot run here.
        """
        if self.merged:
            warnings.warn("already merged: nothing to do", UserWarning, stacklevel=2)
            return
        self._check_unsharded()
        backend = resolve_backend(self.backend, self.weight.device, self.weight.dtype, self.smoa.A.shape[0])
        W_eff = load_backend(backend).modulated_weight(self._packed())
        weight = self.weight if self._shard is None else self._shard.weight(self.weight)
        self._stored_base = self.weight.detach().to("cpu", copy=True)
        try:
            weight.copy_(self._like_weight(W_eff))
        except BaseException:
            self.unmerge()
            raise

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore W0, bit for bit. Unmerging a layer that is not merged warns and changes nothing."""
        if self._stored_base is None:
            warnings.warn("not merged: nothing to do", UserWarning, stacklevel=2)
            return
        self.weight.copy_(self._stored_base)
        self._stored_base = None

    def _check_unsharded(self) -> None:
        self._check_values()
        if self._shard is None and hasattr(self.weight, "full_tensor"):
            raise RuntimeError(FULLY_SHARDED)

    def _packed(self) -> PackedAdapter:
        self._check_unsharded()
        base, shard = self._base, self._shard
        packed = self.smoa.packed(as_matrix(base) if shard is None else shard.weight(base))
        return replace(packed, A=packed.A.detach(), B=packed.B.detach())

    def _like_weight(self, matrix: Tensor) -> Tensor:
        """A matrix (N, C) in the shape of the weight."""
        return matrix if self.weight.ndim == 2 else matrix.view_as(self.weight)

    def extra_repr(self) -> str:
        """Describe the layer as the plain one does, with the adapter's settings."""
        return (
            f"{super().extra_repr()}, r={self.r}, num_blocks={self.num_blocks}, block_order={self.block_order!r}, "
            f"granule={self.granule}, group_size={self.group_size}, alpha={self.alpha:g}, "
            f"dropout={self.dropout}, algorithm={self.algorithm!r}, backend={self.backend!r}"
        )


def as_matrix(weight: Tensor) -> Tensor:
    """W0 as a matrix (N, C)."""
    return weight if weight.ndim == 2 else weight.flatten(1)
