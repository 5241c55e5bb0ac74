"""`AdapterSettings`: the layers' settings in an adapter's configuration, checked, or those of a single layer."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..checks import (
    MOST_BLOCKS,
    MOST_COORDINATES,
    MOST_RANKS,
    check_choice,
    check_count,
    check_finite,
    check_kind,
    check_probability,
    shown,
)
from ..definition.block_rule import BLOCK_ORDERS
from ..definition.ranks import alpha_for_lora_rate
from ..layer_checks import Settings

# Version of the adapter folder's format. It is raised when older releases cannot read a newer folder. Versions 1 and 2
# were never released.
FORMAT_VERSION = 3

_BIASES = ("none", "all", "smoa_only")
_FLAGS = ("use_rslora", "use_lora_rate", "init_weights", "fan_in_fan_out", "inference_mode")

# The patterns that give single layers another value than a field's, each with that field and the check of a value.
_PATTERNS: dict[str, tuple[str, Callable[[str, Any], None]]] = {
    "rank_pattern": ("r", functools.partial(check_count, most=MOST_RANKS)),
    "alpha_pattern": ("smoa_alpha", check_finite),
    "num_blocks_pattern": ("num_blocks", functools.partial(check_count, most=MOST_BLOCKS)),
    "block_order_pattern": ("block_order", functools.partial(check_choice, allowed=BLOCK_ORDERS)),
    "granule_pattern": ("granule", functools.partial(check_count, most=MOST_COORDINATES)),
}


@dataclass
class AdapterSettings(Settings):
    """The fields that SMoA adds to a configuration of PEFT; `smoa_kernels.peft.SMoAConfig` says what each means."""

    group_size: int | str = 1  # type: ignore[assignment]  # "base" becomes a number
    target_modules: list[str] | set[str] | str | None = None
    target_parameters: list[str] | None = None
    smoa_alpha: float | None = None
    smoa_dropout: float = 0.0
    use_rslora: bool = False
    use_lora_rate: bool = False
    init_weights: bool = True
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    num_blocks_pattern: dict[str, int] = field(default_factory=dict)
    block_order_pattern: dict[str, str] = field(default_factory=dict)
    granule_pattern: dict[str, int] = field(default_factory=dict)
    not_linear: list[str] | None = None
    format_version: int | None = None
    weights_sha256: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        self._check_format()
        self._check_blocks()
        self._check_targets()
        if self.smoa_alpha is not None:
            check_finite("smoa_alpha", self.smoa_alpha)
        check_probability("smoa_dropout", self.smoa_dropout)
        if self.smoa_dropout and self.target_parameters:
            raise ValueError(
                f"smoa_dropout must be 0 where target_parameters are adapted, got {self.smoa_dropout}"
            )
        for name in _FLAGS:
            check_kind(name, getattr(self, name), bool)
        if self.use_lora_rate and self.is_from_file:
            raise ValueError(
                "use_lora_rate must be false in an adapter's folder, which holds the scales as numbers (alpha_pattern)"
            )
        check_choice("bias", self.bias, _BIASES)

    @property
    def is_from_file(self) -> bool:
        """Whether this came from a saved adapter, whose weights and block labels are about to be loaded."""
        return self.format_version is not None

    @property
    def alpha(self) -> float:
        """The numerator of the scaling."""
        return self.r if self.smoa_alpha is None else self.smoa_alpha

    @property
    def scaling(self) -> float:
        """s = alpha / r, or alpha / √r."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def for_layer(self, name: str) -> AdapterSettings:
        """The settings of one layer, by its path in the base model: a copy with the patterns applied."""
        layer = copy(self)
        for pattern, (usual, _) in _PATTERNS.items():
            setattr(layer, usual, _matching(getattr(self, pattern), name, getattr(self, usual)))
        if (layer.r, layer.num_blocks) != (self.r, self.num_blocks):
            layer.block_ranks = None
        return layer

    def at_lora_rate(self, sketch: Tensor, elements: int) -> AdapterSettings:
        """The same with the alpha for LoRA's learning rate, as a number; see :func:`alpha_for_lora_rate`."""
        layer = copy(self)
        layer.smoa_alpha = alpha_for_lora_rate(self.alpha, self.num_blocks, sketch, elements)
        layer.use_lora_rate = False
        return layer

    def unmatched_patterns(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Keys that match none of these layers, sorted, for each pattern that has such keys."""
        unmatched = {}
        for pattern in _PATTERNS:
            keys = getattr(self, pattern)
            missed = sorted(key for key in keys if not any(_end(key).match(name) for name in names))
            if missed:
                unmatched[pattern] = missed
        return unmatched

    def _check_format(self) -> None:
        if not isinstance(self.weights_sha256, (str, type(None))):
            raise TypeError(f"weights_sha256 must be a str, got {shown(self.weights_sha256)}")
        version = self.format_version
        if version is None:
            return
        check_count("format_version", version)
        if version != FORMAT_VERSION:
            newer = version > FORMAT_VERSION
            raise ValueError(
                f"format_version {version} of the adapter is {'newer' if newer else 'older'} than what this release "
                f"reads ({FORMAT_VERSION}): {'update smoa-kernels' if newer else 'train the adapter anew'}"
            )

    def _check_blocks(self) -> None:
        group_size = self.group_size
        if group_size == "base" and not self.is_from_file:
            self.group_size = 1  # until an adapter is put into a model
        super().__post_init__()
        self.group_size = group_size
        if self.block_ranks is not None:
            self.block_ranks = list(self.block_ranks)  # as JSON needs it
        for pattern, (_, check) in _PATTERNS.items():
            values = getattr(self, pattern)
            if not isinstance(values, Mapping):
                raise TypeError(f"{pattern} must be a dict from layer names to values, got {shown(values)}")
            for key, value in values.items():
                _check_regex(f"a key of {pattern}", key)
                check(f"{pattern}[{shown(key)}]", value)

    def _check_targets(self) -> None:
        """Check which modules are adapted or saved, and give their lists the types that PEFT and JSON need."""
        lists = ("modules_to_save", "target_parameters", "not_linear")
        for name in ("target_modules", "exclude_modules", "layers_pattern", *lists):
            # If PEFT expects a list and gets a str, it takes its letters as items.
            _check_items(name, getattr(self, name), str, alone=name not in lists)
        _check_items("layers_to_transform", self.layers_to_transform, int, alone=True)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list):
                setattr(self, name, set(value))
            elif isinstance(value, str):
                _check_regex(name, value)
        for name in self.modules_to_save or ():  # PEFT matches it as a regular expression and as a suffix
            _check_regex("modules_to_save", name)
            if not name:
                raise ValueError("modules_to_save must hold names of modules, got ''")
        if self.target_parameters is not None:
            self.target_parameters = sorted(set(self.target_parameters))
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified."
            )


def full_name(name: str) -> str:
    """A pattern's key that matches this layer only, not others whose names end with its name."""
    return f"^{re.escape(name)}"


def _matching(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    matches = (value for key, value in pattern.items() if _end(key).match(name))
    return next(matches, pattern.get(name, default))


# Every layer tries every key of every pattern. With cached expressions this takes seconds, not hours.
@functools.lru_cache(maxsize=2**16)
def _end(key: str) -> re.Pattern[str]:
    """The expression that PEFT's `get_pattern_key` matches layer names with."""
    return re.compile(rf"(.*\.)?({key})$")


def _check_items(name: str, value: Any, kind: type, *, alone: bool) -> None:
    """Raise unless `value` is None, a list (set, tuple) of `kind`, or, where it may stand `alone`, a single one."""
    if value is None or (alone and type(value) is kind):
        return
    if not isinstance(value, (list, set, tuple)) or any(type(item) is not kind for item in value):
        what = {str: "names", int: "indices"}[kind]
        raise TypeError(f"{name} must be a list of {what}{', or one' if alone else ''}, got {shown(value)}")


def _check_regex(name: str, pattern: Any) -> None:
    if not isinstance(pattern, str):  # JSON cannot hold compiled expressions or bytes
        raise ValueError(f"{name} must be a regular expression, got {shown(pattern)}: not a str")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name} must be a regular expression, got {shown(pattern)}: {error}") from error
