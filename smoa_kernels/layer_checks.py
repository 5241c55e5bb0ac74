"""What a `FusedSMoALinear` checks before anything changes: its settings, the layer it adapts, a state dict.

torch copies what fits of a state dict and reports the rest afterwards; here nothing is copied unless all of it fits.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from .backends import ALGORITHMS, BACKENDS
from .checks import (
    check_blocks,
    check_choice,
    check_finite,
    check_kind,
    check_number,
    layout_of,
)
from .definition.partition import BlockPartition
from .definition.ranks import resolve_ranks
from .definition.sketch import TOLERANCE, sketch_distance, sketch_weight

if TYPE_CHECKING:
    from .layers import FusedSMoALinear

__all__ = [
    "LABELS",
    "Settings",
    "check_base",
    "check_fit",
    "check_keys",
    "check_labels",
    "check_tensors",
    "linear_parameters",
]

LABELS = ("smoa_row_block", "smoa_col_block", "smoa_ranks")


def check_keys(name: str, layer: FusedSMoALinear, given: Mapping[str, Any], *, strict: bool) -> None:
    """Whether a `strict` load finds every tensor of the layer, of a plain Linear's its weight and bias, and no other.

    Raises:
        TypeError: a key that is no string.
        ValueError: naming the keys.
    """
    for key in given:
        if not isinstance(key, str):
            raise TypeError(f"{name}: the keys of a state dict must be strings, got {key!r}")
    if not strict:
        return
    own = {key for key, _ in _own(layer)}
    adapted = any(key.startswith("smoa_") for key in given)
    missing = [key for key in own - given.keys() if adapted or not key.startswith("smoa_")]
    for verb, keys in (("lacks", missing), ("must not hold", given.keys() - own)):
        if keys:
            raise ValueError(
                f"{name}: the state dict {verb} {', '.join(sorted(keys))}; strict=False loads the others"
            )


def check_tensors(name: str, layer: FusedSMoALinear, given: Mapping[str, Any]) -> None:
    """Whether what is given for the layer's own tensors is alike in kind and shape.

    Raises:
        TypeError, ValueError: naming the tensor.
    """
    for key, own in _own(layer):
        if key not in given:
            continue
        value = given[key]
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: {key} must be a tensor, got {type(value).__name__}")
        if layout_of(value) != "torch.strided":
            raise TypeError(f"{name}: {key} must be a dense tensor, got layout {layout_of(value)}")
        if value.is_complex() or value.is_floating_point() != own.is_floating_point():
            kind = "floating point" if own.is_floating_point() else "an integer tensor"
            raise TypeError(f"{name}: {key} must be {kind}, got {value.dtype}")
        if value.shape != own.shape:
            raise ValueError(
                f"{name}: size mismatch for {key}: the layer's is {tuple(own.shape)}, "
                f"the state dict's {tuple(value.shape)}"
            )
        if value.is_meta and not own.is_meta:
            raise ValueError(f"{name}: {key} must hold numbers, got a meta tensor")


def check_labels(name: str, layer: FusedSMoALinear, given: Mapping[str, Tensor]) -> BlockPartition:
    """The partition that a state dict holds.

    Raises:
        ValueError: labels or ranks are missing, out of range, or other than the layer's settings.
    """
    missing = [key for key in LABELS if key not in given]
    if missing:
        raise ValueError(f"{name}: the adapter's state dict lacks {', '.join(missing)}")
    rows, cols, ranks = (given[key] for key in LABELS)
    if ranks.min() < 0 or ranks.max() != layer.smoa_A.shape[0] or ranks.sum() != layer.r:
        raise ValueError(
            f"{name}: smoa_ranks must sum to r={layer.r} with a largest rank of {layer.smoa_A.shape[0]}, "
            f"got {ranks.tolist()}; build the layer with those block_ranks"
        )
    return BlockPartition.from_labels(rows, cols, layer.num_blocks)


def check_base(name: str, layer: FusedSMoALinear, given: Mapping[str, Tensor]) -> None:
    """Warn, or raise where the layer is `strict_base`, if the adapter was trained over another base weight."""
    weight = given.get("weight", layer.weight)
    if "smoa_sketch" not in given or weight.is_meta:
        return
    distance = sketch_distance(given["smoa_sketch"], sketch_weight(weight))
    if not distance <= TOLERANCE:  # NaN is no likeness
        message = (
            f"{name}: the adapter was trained over another base weight (they differ by about {distance:.0%}, "
            f"the same base in another precision by at most {TOLERANCE:.0%})"
        )
        if layer.strict_base:
            raise ValueError(f"{message}; strict_base=True refuses it")
        warnings.warn(message, UserWarning, stacklevel=2)


def _own(layer: FusedSMoALinear) -> Iterator[tuple[str, Tensor]]:
    """What the layer's state dict holds, without the hooks of whoever wraps it."""
    yield from layer.named_parameters(recurse=False)
    for key, buffer in layer.named_buffers(recurse=False):
        if key not in layer._non_persistent_buffers_set:
            yield key, buffer


class Settings:
    """The adapter's settings, checked."""

    def __init__(
        self,
        shape: tuple[int, ...],
        r: int,
        num_blocks: int,
        alpha: float | None,
        dropout: float,
        block_ranks: Sequence[int] | None,
        algorithm: str,
        backend: str,
        strict_base: bool,
    ) -> None:
        self.block_ranks = resolve_ranks(r, num_blocks, block_ranks)
        check_blocks(num_blocks, shape)
        if alpha is not None:
            check_finite("alpha", alpha)
        check_number("dropout", dropout)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        check_choice("algorithm", algorithm, ALGORITHMS)
        check_choice("backend", backend, BACKENDS)
        check_kind("strict_base", strict_base, bool)
        self.r, self.num_blocks = r, num_blocks
        self.alpha = float(r if alpha is None else alpha)
        self.dropout, self.algorithm, self.backend = dropout, algorithm, backend
        self.strict_base = strict_base


def check_fit(partition: BlockPartition, shape: tuple[int, ...], num_blocks: int) -> None:
    """Whether a partition was made for such a weight and so many blocks."""
    if not isinstance(partition, BlockPartition):
        raise TypeError(f"partition must be a BlockPartition or None, got {type(partition).__name__}")
    if (partition.shape, partition.num_blocks) != (shape, num_blocks):
        raise ValueError(
            f"partition must be made for a weight of shape {tuple(shape)} and {num_blocks} blocks, got {partition!r}"
        )


def linear_parameters(linear: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weight (N, C) and bias of a layer: the same parameters, or a transposed view of Conv1D's (C, N) weight."""
    kind = type(linear)
    conv1d = kind.__name__ == "Conv1D" and hasattr(linear, "nf")  # by its name: transformers is optional
    if not conv1d and not isinstance(linear, nn.Linear):
        raise TypeError(f"linear must be an nn.Linear or a transformers Conv1D, got {kind.__name__}")
    if "smoa_A" in linear._parameters:
        raise TypeError(
            "linear must be without an adapter, got a FusedSMoALinear, whose adapter would be lost"
        )
    if not conv1d and kind.forward is not nn.Linear.forward:
        raise TypeError(
            f"linear must compute what nn.Linear computes, got {kind.__name__} with a forward of its own; "
            "smoa_kernels.peft adapts quantised layers"
        )
    weight, bias = (linear._parameters.get(name) for name in ("weight", "bias"))
    if weight is None or isinstance(weight, UninitializedParameter):
        raise TypeError(
            f"linear must hold its weight as an initialised parameter, got {kind.__name__} where it is missing, "
            "computed (a parametrisation, pruning) or yet to be shaped"
        )
    if weight.ndim != 2:
        raise ValueError(
            f"weight must be a matrix (out_features, in_features), got shape {tuple(weight.shape)}"
        )
    weight = nn.Parameter(weight.detach().T, requires_grad=False) if conv1d else weight
    if bias is not None and (bias.shape, bias.dtype) != (weight.shape[:1], weight.dtype):
        raise ValueError(
            f"bias must have shape ({weight.shape[0]},) and weight's dtype {weight.dtype}, "
            f"got {tuple(bias.shape)} of {bias.dtype}"
        )
    return weight, bias
