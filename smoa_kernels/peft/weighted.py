"""Adapters that combine others: which can be combined, and the configuration that describes the result."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from ..checks import check_choice, check_finite, check_kind, check_names
from ..definition.packed import PackedAdapter
from .combine import concatenate_adapters, interpolate_factors
from .config import FORMAT_VERSION, SMoAConfig

__all__ = ["check_combination", "combined_config"]


def check_combination(
    configs: Mapping[str, SMoAConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
) -> Callable[[Sequence[PackedAdapter], Sequence[float]], PackedAdapter]:
    """The function that combines, if `configs` (by adapter) allow it.

    Raises:
        TypeError, ValueError: as `SMoAModel.add_weighted_adapter` says.
    """
    check_kind("adapter_name", adapter_name, str)
    check_names("adapters", adapters)
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"weights must be a list of numbers, got {weights!r}")
    if adapter_name in configs:
        raise ValueError(f"adapter_name must be a new name, got {adapter_name!r}, which exists")
    for name in adapters:
        if name not in configs:
            raise ValueError(f"adapters must name existing adapters, got {name!r}")
        config = configs[name]
        if config.bias != "none" or config.modules_to_save:
            raise ValueError(
                f"adapters must train nothing but their factors, got {name!r} with bias={config.bias!r} and "
                f"modules_to_save={config.modules_to_save}"
            )
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"weights must hold one number for each of {list(adapters)}, got {list(weights)}")
    for weight in weights:
        check_finite("weights", weight)
    combinations = {"cat": concatenate_adapters, "linear": interpolate_factors}
    check_choice("combination_type", combination_type, combinations)
    return combinations[combination_type]


def combined_config(template: SMoAConfig, combined: dict[str, PackedAdapter]) -> SMoAConfig:
    """A configuration that describes these adapters, layer by layer, with s = 1."""
    shapes = {name: (int(a.ranks.sum()), a.partition.num_blocks) for name, a in combined.items()}
    (r, num_blocks), _ = Counter(shapes.values()).most_common(1)[0]
    config = copy.deepcopy(template)
    config.r, config.num_blocks, config.block_ranks = r, num_blocks, None
    config.smoa_alpha, config.alpha_pattern, config.use_rslora, config.smoa_dropout = None, {}, False, 0.0
    # In full: the name of one layer may be the end of another's.
    config.target_modules, config.exclude_modules = "|".join(map(re.escape, sorted(combined))), None
    config.layers_to_transform = config.layers_pattern = None
    config.rank_pattern = {_whole_name(name): rank for name, (rank, _) in shapes.items() if rank != r}
    config.num_blocks_pattern = {_whole_name(name): K for name, (_, K) in shapes.items() if num_blocks != K}
    config.inference_mode = False
    config.format_version = FORMAT_VERSION  # its labels are about to be filled in, not computed
    return config


def _whole_name(name: str) -> str:
    """Key of a pattern that matches this layer and none whose name ends like its."""
    return f"^{re.escape(name)}"
