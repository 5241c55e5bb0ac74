"""Combines several adapters over one weight into one, for layers with several active ones and weighted sums of them.

`Σ_i ΔW_i` is an adapter itself. If the partitions agree, its factors are the concatenated ones. Otherwise it has one
block (HiRA), and its factors are zero outside the blocks that they came from. So the layer multiplies by W0 once,
however many adapters are active.
"""

from __future__ import annotations

import copy
import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..adapter_folder.settings import FORMAT_VERSION, full_name
from ..checks import check_choice, check_finite
from ..definition.labels import same_groups
from ..definition.packed import PackedAdapter, padding_masks
from ..definition.partition import BlockPartition
from .config import SMoAConfig


def sum_adapters(parts: Sequence[PackedAdapter], single: BlockPartition | None = None) -> PackedAdapter:
    """The adapter whose ΔW is the sum of `parts`'; differentiable in their factors.

    Args:
        parts: adapters over one weight. Partitions that agree must be the same object.
        single: the partition with a single block, if the caller has it.
    """
    first = parts[0]
    dtype = functools.reduce(torch.promote_types, (part.A.dtype for part in parts))
    if all(part.partition is first.partition for part in parts):
        partition = first.partition
        factors = [_masked(part) for part in parts]
    else:
        partition = single_block(first.partition) if single is None else single
        factors = [part.expanded_factors(torch.promote_types(dtype, torch.float32)) for part in parts]
    A = torch.cat([A.to(dtype) for A, _ in factors])
    B = torch.cat([B.to(dtype) for _, B in factors], 1)
    # Padding became zeros, which add nothing, so every block may have the full rank.
    blocks, rank = partition.num_blocks, A.shape[0]
    ranks = torch.full((blocks,), rank, dtype=torch.int32, device=A.device)
    scaling = torch.ones_like(first.scaling)
    return PackedAdapter(first.weight, A, B, partition, ranks, scaling, [rank] * blocks, first.place)


def single_block(like: BlockPartition) -> BlockPartition:
    """The partition of K = 1 over the same rows and columns: every coordinate in block 0."""
    rows, cols = (torch.zeros(size, dtype=torch.uint8, device=like.device) for size in like.shape)
    return BlockPartition.from_labels(rows, cols, 1)


@torch.no_grad()
def concatenate_adapters(parts: Sequence[PackedAdapter], weights: Sequence[float]) -> PackedAdapter:
    """Make the adapter with s = 1 whose ΔW is `Σ_i w_i ΔW_i`; each block's rank is the sum of the parts' largest."""
    return sum_adapters([replace(p, scaling=p.scaling * w) for p, w in zip(parts, weights, strict=True)])


@torch.no_grad()
def interpolate_factors(parts: Sequence[PackedAdapter], weights: Sequence[float]) -> PackedAdapter:
    """Make an adapter with s = 1 whose factors are the weighted sums of the parts'; ValueError if blocks differ.

    Each factor takes the root of w_i·s_i, as in LoRA's "linear" combination: exact for one adapter, a heuristic
    for several, since a product of sums is not the sum of products.
    """
    first = parts[0]
    for part in parts:
        if part.partition != first.partition or not torch.equal(part.ranks, first.ranks):
            raise ValueError(
                'combination_type="linear" needs adapters with the same blocks and ranks; use "cat", which is exact'
            )
    factors = [_masked(replace(part, scaling=torch.ones_like(part.scaling))) for part in parts]
    A, B = torch.zeros_like(first.A), torch.zeros_like(first.B)
    for (A_i, B_i), part, w in zip(factors, parts, weights, strict=True):
        share = float(w * part.scaling)
        root = abs(share) ** 0.5
        A += A_i * root
        B += B_i * (root if share >= 0 else -root)
    return PackedAdapter(first.weight, A, B, first.partition, first.ranks, torch.ones_like(first.scaling))


def _masked(part: PackedAdapter) -> tuple[Tensor, Tensor]:
    """The factors, with padding set to zero and s folded into B."""
    A_mask, B_mask = padding_masks(part.partition, part.ranks, part.A.shape[0])
    # Selected, not multiplied by the masks: padding may hold anything, and 0 · NaN is NaN.
    return part.A.where(A_mask, 0), (part.B * part.scaling.to(part.B.dtype)).where(B_mask, 0)


def check_combination(
    configs: Mapping[str, SMoAConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
) -> Callable[[Sequence[PackedAdapter], Sequence[float]], PackedAdapter]:
    """Choose the function that combines, after checking that `configs` (by adapter) allow it."""
    if adapter_name in configs:
        raise ValueError(f"adapter_name must be a new name, got {adapter_name!r}, which exists")
    for name in adapters:
        if name not in configs:
            raise ValueError(f"adapters must name existing adapters, got {name!r}")
        config = configs[name]
        if config.target_parameters:
            raise ValueError(f"adapters of experts (target_parameters) cannot be combined, got {name!r}")
        if config.bias != "none" or config.modules_to_save:
            raise ValueError(
                f"adapters must train nothing but their factors, got {name!r} with bias={config.bias!r} and "
                f"modules_to_save={config.modules_to_save}"
            )
    if len(groups := {configs[name].group_size for name in adapters}) > 1:
        raise ValueError(f"adapters must have one group_size to be combined, got {sorted(groups)}")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"weights must hold one number for each of {list(adapters)}, got {list(weights)}")
    for weight in weights:
        check_finite("weights", weight)
    combinations = {"cat": concatenate_adapters, "linear": interpolate_factors}
    check_choice("combination_type", combination_type, combinations)
    return combinations[combination_type]


def check_one_map(name: str, maps: Sequence[Tensor | None]) -> None:
    """Raise unless the adapters of a layer have the same groups of columns, by their `col_group`."""
    if not all(same_groups(groups, maps[0]) for groups in maps):
        raise ValueError(f"{name}: adapters must have one col_group to be combined")


def combined_config(template: SMoAConfig, combined: dict[str, PackedAdapter]) -> SMoAConfig:
    """Make the configuration that describes the combined adapters, by layer, with s = 1."""
    shapes = {name: (int(a.ranks.sum()), a.partition.num_blocks) for name, a in combined.items()}
    (r, num_blocks), _ = Counter(shapes.values()).most_common(1)[0]
    config = copy.deepcopy(template)
    config.r, config.num_blocks, config.block_ranks = r, num_blocks, None
    config.smoa_alpha, config.alpha_pattern, config.use_rslora, config.smoa_dropout = None, {}, False, 0.0
    # Blocks are given. A granule is not needed, and one adapter's might not allow another's K.
    config.granule, config.granule_pattern = 1, {}
    config.target_modules, config.exclude_modules = "|".join(map(re.escape, sorted(combined))), None
    config.layers_to_transform = config.layers_pattern = None
    config.rank_pattern = {full_name(name): rank for name, (rank, _) in shapes.items() if rank != r}
    config.num_blocks_pattern = {full_name(name): K for name, (_, K) in shapes.items() if num_blocks != K}
    config.inference_mode = False
    config.format_version = FORMAT_VERSION  # so that block labels are filled in, not computed
    return config
