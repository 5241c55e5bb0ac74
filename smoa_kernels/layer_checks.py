"""Checks of a `FusedSMoALinear` before it changes anything: of its settings, the layer it adapts, a state dict.

torch copies the tensors of a state dict that fit and then reports the rest. Here nothing is copied unless all fit.
At the end: what torch's own encoder, which may read a layer's weight in place of calling it, needs of an adapted layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter

from .backends import ALGORITHM_CHOICES, BACKEND_CHOICES
from .checks import check_choice, check_count, check_device, check_finite, check_kind, check_probability
from .definition.block_rule import BlockRule
from .definition.dropout import WIDEST
from .definition.labels import check_groups
from .definition.partition import BlockPartition
from .definition.precision import DTYPES
from .definition.ranks import resolve_ranks


@dataclass
class Settings:
    """What :class:`smoa_kernels.FusedSMoALinear` and `SMoAConfig` call alike; the first says what each means."""

    r: int = 8
    num_blocks: int = 2
    block_ranks: Sequence[int] | None = None
    block_order: str = "spectral"
    granule: int = 1
    block_seed: int = 0
    group_size: int = 1
    algorithm: str = "auto"
    backend: str = "auto"
    strict_base: bool = False

    def __post_init__(self) -> None:
        resolve_ranks(self.r, self.num_blocks, self.block_ranks)
        self.rule.check()
        check_choice("algorithm", self.algorithm, ALGORITHM_CHOICES)
        check_choice("backend", self.backend, BACKEND_CHOICES)
        check_kind("strict_base", self.strict_base, bool)

    @property
    def rule(self) -> BlockRule:
        """How blocks are made; includes K."""
        return BlockRule(self.num_blocks, self.block_order, self.granule, self.block_seed, self.group_size)

    @property
    def ranks(self) -> tuple[int, ...]:
        """r_k of each block."""
        return resolve_ranks(self.r, self.num_blocks, self.block_ranks)


@dataclass
class LayerSettings(Settings):
    """Those of :class:`smoa_kernels.FusedSMoALinear`, of convolutions and of embeddings."""

    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None:
            check_finite("alpha", self.alpha)
        check_probability("dropout", self.dropout)

    @property
    def scaling(self) -> float:
        """s = alpha / r."""
        return (self.r if self.alpha is None else self.alpha) / self.r


def check_linear(
    in_features: int, out_features: int, bias: bool, device: torch.device | str | None, dtype: Any
) -> None:
    """Check the arguments that `nn.Linear` takes too."""
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        check_count(name, size, 1, WIDEST)
    check_kind("bias", bias, bool)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in DTYPES):
        raise TypeError(f"dtype must be floating point of 16 bits or more, got {dtype}")
    if device is not None:
        check_device(device)


def check_fit(partition: BlockPartition, shape: tuple[int, ...], num_blocks: int, group_size: int) -> None:
    """Check that a partition was made for a weight of this shape, and for so many blocks, which end at groups."""
    check_kind("partition", partition, BlockPartition)
    if (partition.shape, partition.num_blocks) != (shape, num_blocks):
        raise ValueError(
            f"partition must be made for a weight of shape {tuple(shape)} and {num_blocks} blocks, got {partition!r}"
        )
    check_groups("partition", partition.col_block, group_size)


def matrix_shape(layer: Any) -> tuple[int, int]:
    """(N, C), the shape of a layer's W0 as a matrix: by attributes, since the weight's own is empty under ZeRO-3."""
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if hasattr(layer, "kernel_size"):
        return layer.out_channels, layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    if hasattr(layer, "nf"):  # transformers' Conv1D
        return layer.nf, layer.nx
    return layer.out_features, layer.in_features


def has_forward_of(layer: Any, *plain: Any) -> bool:
    """Whether a layer has the forward of one of these classes of torch, a convolution also what that calls."""
    called = getattr(layer, "_conv_forward", None)
    return any(
        type(layer).forward is kind.forward
        and getattr(called, "__func__", called) is getattr(kind, "_conv_forward", None)
        for kind in plain
    )


def plain_parameters(name: str, layer: nn.Module, plain: Any) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weight and bias of the layer to adapt, the argument `name`, whose class must be `plain`.

    For `nn.Linear` it may be transformers' Conv1D, whose weight is viewed transposed.
    """
    kind, is_linear = type(layer), plain is nn.Linear
    conv1d = is_linear and kind.__name__ == "Conv1D" and hasattr(layer, "nf")  # transformers is optional
    called = kind is not NonDynamicallyQuantizableLinear  # nn.MultiheadAttention reads the weight of its own
    if not conv1d and not (isinstance(layer, plain) and has_forward_of(layer, plain) and called):
        raise TypeError(
            f"{name} must be an nn.{plain.__name__}{' or a transformers Conv1D' * is_linear} with the forward of that "
            f"class and without an adapter, got {kind.__name__}; smoa_kernels.peft adapts quantised layers and "
            "nn.MultiheadAttention"
        )
    weight, bias = (layer._parameters.get(key) for key in ("weight", "bias"))
    if weight is None or isinstance(weight, UninitializedParameter):
        raise TypeError(
            f"{name} must hold its weight as an initialised parameter, got {kind.__name__} where it is missing, "
            "computed (a parametrisation, pruning) or yet to be shaped"
        )
    if weight.dtype not in DTYPES:
        raise TypeError(f"{name}: weight must be of 16 bits or more, got {weight.dtype}")
    if is_linear and weight.ndim != 2:
        raise ValueError(
            f"weight must be a matrix (out_features, in_features), got shape {tuple(weight.shape)}"
        )
    weight = nn.Parameter(weight.detach().T, requires_grad=False) if conv1d else weight
    if bias is not None and (bias.shape, bias.dtype) != (weight.shape[:1], weight.dtype):
        raise ValueError(
            f"bias must have shape ({weight.shape[0]},) and weight's dtype {weight.dtype}, "
            f"got {tuple(bias.shape)} of {bias.dtype}"
        )
    check_embedding(name, layer)
    return weight, bias


def check_embedding(name: str, embedding: nn.Module) -> None:
    """Refuse an embedding that rewrites its weight while it looks rows up."""
    if getattr(embedding, "max_norm", None) is not None:
        raise ValueError(
            f"{name} must have max_norm=None, got {embedding.max_norm}: each lookup would rewrite the frozen weight"
        )


# Checks of a state dict: `name` is the layer's in messages, `own` holds its tensors by key, `given` the state dict's.


def check_keys(name: str, own: Mapping[str, Tensor], given: Mapping[str, Any], *, strict: bool) -> None:
    """Check the keys: a `strict` load takes all of the layer's, or weight and bias alone, and no other."""
    for key in given:
        if not isinstance(key, str):
            raise TypeError(f"{name}: the keys of a state dict must be strings, got {key!r}")
    if not strict:
        return
    adapted = any(key.startswith("smoa.") for key in given)
    missing = [key for key in own.keys() - given.keys() if adapted or not key.startswith("smoa.")]
    for verb, keys in (("lacks", missing), ("must not hold", given.keys() - own.keys())):
        if keys:
            raise ValueError(
                f"{name}: the state dict {verb} {', '.join(sorted(keys))}; strict=False loads the others"
            )


def call_always(layer: nn.Module) -> None:
    """Keep an `nn.TransformerEncoderLayer` around `layer` off its fast path, which reads the weights in it.

    It takes that path in evaluation, unless a module in it has a hook. Pickle finds this hook by its name.
    """
    layer.register_forward_pre_hook(_nothing)


def _nothing(module: nn.Module, args: Any) -> None:
    pass


def over_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function of (T, C) to a nested tensor, which `nn.TransformerEncoder` makes of a padded batch."""
    if x.layout == torch.jagged:  # the result shares x's offsets, so that sums with x are allowed
        jagged: Any = x
        return torch.nested.nested_tensor_from_jagged(
            function(x.values()), jagged.offsets(), jagged.lengths()
        )
    parts = x.unbind()
    y = function(torch.cat(parts)).split([len(part) for part in parts])
    return torch.nested.as_nested_tensor(list(y))
