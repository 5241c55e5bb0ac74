"""Checks of the operator's arguments, made before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_dense, check_finite, check_kind, check_probability, layout_of
from ..definition.dropout import WIDEST
from ..definition.partition import BlockPartition
from ..definition.precision import autocast_enabled


def check_tensors(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    ranks: Tensor,
    *,
    autocast: bool,
) -> None:
    """Check kinds, devices, shapes and dtypes of `smoa_linear`'s tensors; under autocast W0 and x are cast."""
    _check_dense(x, weight=weight, bias=bias, A=A, B=B, ranks=ranks)
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape (out_features, in_features), got {tuple(weight.shape)}")
    out_features, in_features = weight.shape
    _check_features(x, weight)
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias must have shape ({out_features},), got {tuple(bias.shape)}")
    if A.ndim != 2 or A.shape[1] != in_features:
        raise ValueError(f"A must have shape (ρ, {in_features}), got {tuple(A.shape)}")
    if B.shape != (out_features, A.shape[0]):
        raise ValueError(f"B must have shape ({out_features}, {A.shape[0]}) to fit A, got {tuple(B.shape)}")
    check_frozen(weight)
    if A.dtype != B.dtype:
        raise TypeError(f"A and B must have one dtype, got {A.dtype} and {B.dtype}")
    if autocast:
        return
    if x.itemsize < 2:
        raise TypeError(f"x must be of 16 bits or more, got {x.dtype}")
    _check_dtype(x, "weight", weight)
    if bias is not None:
        _check_dtype(x, "bias", bias)
    if A.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"A and B must have weight's dtype {weight.dtype} or float32, got {A.dtype}")


def check_frozen(weight: Tensor) -> None:
    """Check that W0 asks for no gradient, which it would not get."""
    if weight.requires_grad:
        raise ValueError(
            "weight must be frozen, since SMoA trains A and B only: got requires_grad=True; "
            "call weight.requires_grad_(False)"
        )


def check_partition(partition: BlockPartition, weight: Tensor, ranks: Tensor) -> None:
    """Check that the blocks are those of a weight like `weight`, and that there is a rank for each block."""
    check_kind("partition", partition, BlockPartition)
    if partition.shape != weight.shape:
        raise ValueError(
            f"partition must be made for a weight of shape {tuple(weight.shape)}, got one for {partition.shape}"
        )
    if partition.device != weight.device:
        raise ValueError(f"partition must be on weight's device {weight.device}, got {partition.device}")
    if ranks.dtype != torch.int32 or ranks.shape != (partition.num_blocks,):
        raise ValueError(
            f"ranks must be int32 of shape ({partition.num_blocks},), got {ranks.dtype} of {tuple(ranks.shape)}"
        )


def check_scaling(scaling: float | Tensor, x: Tensor) -> None:
    """Check that s is a finite number, or a 0-d tensor of a real number that is not trained."""
    if not isinstance(scaling, Tensor):
        check_finite("scaling", scaling)
    elif scaling.is_nested or scaling.layout != torch.strided or (scaling.is_meta and not x.is_meta):
        given = "a meta tensor" if scaling.is_meta else f"layout {layout_of(scaling)}"
        raise TypeError(f"scaling must be a dense tensor that holds a number, got {given}")
    elif scaling.ndim:
        raise ValueError(f"scaling must be a number or a 0-d tensor, got shape {tuple(scaling.shape)}")
    elif scaling.dtype.is_complex or scaling.dtype == torch.bool:
        raise TypeError(f"scaling must be real, got {scaling.dtype}")
    elif scaling.requires_grad:
        raise ValueError("scaling must not require grad: it is not trained")


def check_dropout(x: Tensor, p: float, seed: Tensor | None) -> None:
    """Check the arguments of the dropout mask."""
    check_probability("dropout_p", p)
    if seed is None:
        return
    check_dense("dropout_seed", seed, integer=True)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise TypeError(
            f"dropout_seed must be an int64 tensor with one element, got {seed.dtype} of {tuple(seed.shape)}"
        )
    if seed.device != x.device:
        raise ValueError(f"dropout_seed must be on x's device {x.device}, got {seed.device}")


def check_place(x: Tensor, row_offset: int, column_offset: int, global_in_features: int | None) -> None:
    """Check where a shard lies; the global number of columns, if given, must include x's."""
    given = 0 if global_in_features is None else global_in_features
    offsets = {"row_offset": row_offset, "column_offset": column_offset}
    for name, value in (*offsets.items(), ("global_in_features", given)):
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{name} must be an int, got {value!r}")
    if row_offset < 0:
        raise ValueError(f"row_offset must be at least 0, got {row_offset}")
    columns = x.shape[-1]
    width = columns if global_in_features is None else global_in_features
    if column_offset < 0 or column_offset + columns > width:
        raise ValueError(
            f"column_offset and global_in_features must hold x's {columns} columns: "
            f"got columns {column_offset} to {column_offset + columns} of {width}"
        )
    if global_in_features is not None and width > WIDEST:
        raise ValueError(f"global_in_features must be at most {WIDEST}, got {width}")


def check_input(x: Tensor, weight: Tensor) -> None:
    """Check that `x Wᵀ` can be computed; outside autocast both must have one dtype."""
    _check_dense(x, weight=weight)
    _check_features(x, weight)
    if not autocast_enabled(x):
        _check_dtype(x, "weight", weight)


def check_block_ranks(block_ranks: Sequence[int] | None, num_blocks: int, rho: int) -> None:
    """Check that `block_ranks` can be ranks; `check_ranks` compares them with the tensor's."""
    if block_ranks is None:
        return
    fits = isinstance(block_ranks, (tuple, Sequence)) and len(block_ranks) == num_blocks
    for rank in block_ranks if fits else ():
        fits = fits and isinstance(rank, int) and 0 <= rank <= rho
    if not fits:
        raise ValueError(
            f"block_ranks must be the {num_blocks} numbers in ranks, in [0, {rho}], got {block_ranks!r}"
        )


def check_ranks(ranks: Tensor, block_ranks: Sequence[int] | None, rho: int) -> None:
    """Check the ranks' range on a CPU. Reading them from a GPU would wait; there the kernels clamp them to ρ."""
    if ranks.device.type != "cpu":
        return
    given = ranks.tolist()
    if not 0 <= min(given) <= max(given) <= rho:
        raise ValueError(f"ranks must lie in [0, {rho}], A's rows, got {given}")
    if block_ranks is not None and list(block_ranks) != given:
        raise ValueError(f"block_ranks must be the numbers in ranks, {given}, got {list(block_ranks)}")


def _check_dense(x: Tensor, **others: Any) -> None:
    """Check that all (a bias may be None) are dense tensors on x's device, and all but ranks floating point."""
    check_dense("x", x)
    device = x.device
    for name, value in others.items():
        if value is None and name == "bias":
            continue
        check_dense(name, value, integer=name == "ranks")
        if value.device != device:
            raise ValueError(f"{name} must be on x's device {device}, got {value.device}")


def _check_features(x: Tensor, weight: Tensor) -> None:
    if x.ndim < 1 or x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"x must have {weight.shape[-1]} features in its last dimension, got shape {tuple(x.shape)}"
        )


def _check_dtype(x: Tensor, name: str, value: Tensor) -> None:
    if value.dtype != x.dtype:
        raise TypeError(f"{name} must have x's dtype {x.dtype} outside autocast, got {value.dtype}")
