"""`smoa_linear`: the public function. Validates its arguments, resolves the backend, calls the operator."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import ALGORITHMS, load_backend, resolve_backend
from .dropout import draw_seed
from .operator import linear
from .packed import scaling_tensor
from .partition import BlockPartition

__all__ = ["smoa_linear"]


def smoa_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    partition: BlockPartition,
    ranks: Tensor,
    *,
    scaling: float | Tensor,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    column_offset: int = 0,
    global_in_features: int | None = None,
    algorithm: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """`y = x W0ᵀ + b + dropout(x) ΔWᵀ` with `ΔW = s·mask·(BA) ∘ W0` (docs/definition.md).

    Differentiable in x, A, B and bias. Saves x, the factors and the seed for backward, nothing else; W0 is
    referenced. Double backward raises: `reference.reference_linear` has one.

    Args:
        x: (..., C), floating point, any strides; any leading dimensions, zero tokens included.
        weight: W0 (N, C), frozen, x's dtype (under autocast it is cast as `F.linear`'s would be).
        bias: (N,) or None.
        A: packed factor (ρ, C); W0's dtype or float32.
        B: packed factor (N, ρ), A's dtype. Rows t ≥ r_k of a block are padding: ignored, gradient zero.
        partition: blocks of W0's rows and columns, on x's device.
        ranks: int32 (K,), rank of each block, 0 ≤ r_k ≤ ρ. Checked on the CPU; on a GPU, which is not waited for,
            what lies outside is taken as 0 or ρ.
        scaling: s, a number or a 0-d tensor (which a compiled graph does not bake in).
        dropout_p: probability in [0, 1) of dropping an element of the adapter's input.
        dropout_seed: int64 with one element on x's device; drawn from the default generator when None.
        column_offset: where x holds a shard of the columns, the global index of its first one.
        global_in_features: likewise, the global number of columns; C when None.
        algorithm: "merged" (one GEMM with W_eff), "split" (adapter first, the base GEMM accumulates onto it),
            "expanded" (few tokens, eager), "fused" (few tokens, triton: one kernel) or "auto": the form for few
            tokens where there are few, else merged where the GEMM multiplies in
            IEEE float32/64, split in half precision and TF32, where a rounded W_eff would lose a small update,
            and whenever dropout is active.
        backend: "eager" (torch operators), "triton", "reference" (the definition, slow) or "auto".

    Returns:
        y (..., N) in x's dtype.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed; nothing was computed.

    Example:
        >>> weight = torch.randn(6, 4)
        >>> partition = BlockPartition.from_weight(weight, num_blocks=2)
        >>> A, B = torch.randn(1, 4), torch.zeros(6, 1)
        >>> ranks = torch.ones(2, dtype=torch.int32)
        >>> y = smoa_linear(torch.randn(3, 4), weight, None, A, B, partition, ranks, scaling=0.5)
        >>> y.shape
        torch.Size([3, 6])
    """
    autocast = _autocast_enabled(x)
    _check_tensors(x, weight, bias, A, B, ranks, autocast=autocast)
    _check_scaling(scaling)
    _check_partition(partition, weight, ranks)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    if autocast and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if dropout_p > 0 and dropout_seed is None:
        dropout_seed = draw_seed(x.device)
    _check_seed(dropout_seed, x)
    backend = resolve_backend(backend, x.device, x.dtype, A.shape[0])
    _check_algorithm(algorithm, backend, dropout_p)
    width = _check_width(x, column_offset, global_in_features)
    y: Tensor = linear(
        x,
        weight,
        bias,
        A,
        B,
        ranks,
        scaling_tensor(scaling, x.device),
        dropout_seed if dropout_p > 0 else None,
        partition.tensors(),
        partition.sizes(),
        dropout_p,
        column_offset,
        width,
        algorithm,
        backend,
    )
    return y


def _check_algorithm(algorithm: str, backend: str, dropout_p: float) -> None:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    if algorithm == "auto":
        return
    allowed = load_backend(backend).ALGORITHMS
    if algorithm not in allowed:
        raise ValueError(
            f"algorithm must be auto or one of {', '.join(allowed)} on backend {backend!r}, got {algorithm!r}"
        )
    if dropout_p > 0 and algorithm != "split":
        raise ValueError(
            f"algorithm must be 'split' or 'auto' while dropout is active (dropout_p={dropout_p}): the adapter "
            f"sees another x than the base layer. Got {algorithm!r}"
        )


def _autocast_enabled(x: Tensor) -> bool:
    # Meta tensors know no autocast, and asking whether a device does breaks the graph in torch 2.11.
    return isinstance(x, Tensor) and not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _check_tensors(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    ranks: Tensor,
    *,
    autocast: bool,
) -> None:
    named = {"x": x, "weight": weight, "bias": bias, "A": A, "B": B, "ranks": ranks}
    for name, value in named.items():
        if value is None and name == "bias":
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if name != "ranks" and not value.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {value.dtype}")
        if value.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {value.device}")
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape (out_features, in_features), got {tuple(weight.shape)}")
    out_features, in_features = weight.shape
    if x.ndim < 1 or x.shape[-1] != in_features:
        raise ValueError(
            f"x must have {in_features} features in its last dimension, got shape {tuple(x.shape)}"
        )
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias must have shape ({out_features},), got {tuple(bias.shape)}")
    if A.ndim != 2 or A.shape[1] != in_features:
        raise ValueError(f"A must have shape (ρ, {in_features}), got {tuple(A.shape)}")
    if B.shape != (out_features, A.shape[0]):
        raise ValueError(f"B must have shape ({out_features}, {A.shape[0]}) to fit A, got {tuple(B.shape)}")
    if weight.requires_grad:
        raise ValueError(
            "weight must be frozen, since SMoA trains A and B only: got requires_grad=True; "
            "call weight.requires_grad_(False)"
        )
    if A.dtype != B.dtype:
        raise TypeError(f"A and B must have one dtype, got {A.dtype} and {B.dtype}")
    if autocast:
        return
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != x.dtype:
            raise TypeError(f"{name} must have x's dtype {x.dtype} outside autocast, got {value.dtype}")
    if A.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"A and B must have weight's dtype {weight.dtype} or float32, got {A.dtype}")


def _check_partition(partition: BlockPartition, weight: Tensor, ranks: Tensor) -> None:
    if not isinstance(partition, BlockPartition):
        raise TypeError(f"partition must be a BlockPartition, got {type(partition).__name__}")
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


def _check_scaling(scaling: float | Tensor) -> None:
    if isinstance(scaling, Tensor):
        if scaling.ndim:
            raise ValueError(f"scaling must be a number or a 0-d tensor, got shape {tuple(scaling.shape)}")
        if scaling.requires_grad:
            raise ValueError("scaling must not require grad: it is not trained")
    elif isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling must be a number or a 0-d tensor, got {type(scaling).__name__}")


def _check_seed(seed: Tensor | None, x: Tensor) -> None:
    if seed is None:
        return
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.numel() != 1:
        given = f"{seed.dtype} of {tuple(seed.shape)}" if isinstance(seed, Tensor) else repr(seed)
        raise TypeError(f"dropout_seed must be an int64 tensor with one element, got {given}")
    if seed.device != x.device:
        raise ValueError(f"dropout_seed must be on x's device {x.device}, got {seed.device}")


def _check_width(x: Tensor, column_offset: int, global_in_features: int | None) -> int:
    width = x.shape[-1] if global_in_features is None else global_in_features
    if column_offset < 0 or column_offset + x.shape[-1] > width:
        raise ValueError(
            f"column_offset and global_in_features must hold x's {x.shape[-1]} columns: "
            f"got columns {column_offset} to {column_offset + x.shape[-1]} of {width}"
        )
    return width
