"""What a configuration says about one layer."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checks import check_kind
from ..definition.ranks import resolve_ranks

if TYPE_CHECKING:
    from .config import SMoAConfig

__all__ = ["LayerSettings", "layer_settings"]


class LayerSettings(NamedTuple):
    """A configuration for one layer, its patterns applied.

    Attributes:
        r: rank budget.
        num_blocks: K.
        block_ranks: rank of each block, or None to share r evenly.
        alpha: numerator of the scaling; r when None.
        config: everything that is the same for all layers.

    Example:
        >>> from smoa_kernels.peft import SMoAConfig
        >>> LayerSettings(r=8, num_blocks=2, block_ranks=None, alpha=16, config=SMoAConfig()).scaling
        2.0
    """

    r: int
    num_blocks: int
    block_ranks: Sequence[int] | None
    alpha: float | None
    config: SMoAConfig

    @property
    def ranks(self) -> tuple[int, ...]:
        """r_k of each block."""
        return resolve_ranks(self.r, self.num_blocks, self.block_ranks)

    @property
    def scaling(self) -> float:
        """s = alpha / r, or alpha / √r."""
        alpha = self.r if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.r) if self.config.use_rslora else self.r)


def layer_settings(config: SMoAConfig, name: str) -> LayerSettings:
    """What `config` says about the layer at the path `name`, a string, of the base model.

    Raises:
        TypeError: the name is no string.

    Example:
        >>> from smoa_kernels.peft import SMoAConfig
        >>> layer_settings(SMoAConfig(r=8, rank_pattern={"q_proj": 4}), "layers.0.q_proj").r
        4
    """

    check_kind("name", name, str)

    def matching(pattern: Mapping[str, Any], default: Any) -> Any:
        found = (value for key, value in pattern.items() if _end(key).match(name))
        return next(found, pattern.get(name, default))

    r = matching(config.rank_pattern, config.r)
    num_blocks = matching(config.num_blocks_pattern, config.num_blocks)
    usual = (r, num_blocks) == (config.r, config.num_blocks)
    alpha = matching(config.alpha_pattern, config.smoa_alpha)
    return LayerSettings(r, num_blocks, config.block_ranks if usual else None, alpha, config)


# Every layer asks for every key, of which a configuration has fewer than half as many.
@functools.lru_cache(maxsize=2**14)
def _end(key: str) -> re.Pattern[str]:
    """What a layer's path must match for a pattern's key, as PEFT's `get_pattern_key` has it."""
    return re.compile(rf"(.*\.)?({key})$")
