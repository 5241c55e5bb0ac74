"""Launch parameters without a measurement: a pure function of the architecture, its multiprocessors and the sizes.

It always answers, and only with a shipped configuration (`launch.py`), which the audit has compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..checks import check_choice, check_count, check_kind
from ..definition.precision import KERNEL_PRECISIONS, PRECISIONS
from .launch import (
    MODULATE_CONFIGS,
    PERMUTE_CONFIGS,
    SUM_CONFIGS,
    BlockGradConfig,
    BlockMatmulConfig,
    Config,
    FusedLinearConfig,
    ModulateConfig,
    PermuteConfig,
    SumConfig,
    block_grad_configs,
    block_matmul_configs,
    fused_linear_configs,
)

__all__ = [
    "ALGORITHM_KEYS",
    "CONFIGS",
    "DTYPES",
    "Key",
    "bucket",
    "check_key",
    "fits",
    "heuristic",
    "shipped",
]

CONFIGS: dict[str, type[Config]] = {
    "modulated_weight": ModulateConfig,
    "modulated_blocks": ModulateConfig,
    "permute": PermuteConfig,
    "block_matmul": BlockMatmulConfig,
    "fused_linear": FusedLinearConfig,
    "block_grad": BlockGradConfig,
    "sum_parts": SumConfig,
    "sum_partials": SumConfig,
}
"""Every kernel whose launch parameters are chosen, and what they are."""

ALGORITHM_KEYS: Mapping[str, tuple[str, ...]] = {
    "forward": ("merged", "split", "fused"),
    "input_gradient": ("merged", "fused"),
}
"""Keys whose choice is an algorithm, and which there are."""

DTYPES = {name: PRECISIONS[name].dtype for name in KERNEL_PRECISIONS}
"""What a kernel multiplies, by the audit's names; "fp32" is IEEE."""


class Key(NamedTuple):
    """What a choice depends on beside the GPU; 0 where a kernel does not see a size.

    Attributes:
        kernel: one of `CONFIGS`, or of `ALGORITHM_KEYS` where the choice is an algorithm.
        dtype: one of `DTYPES`.
        rank: ρ, rows of A.
        blocks: K.
        out_features: N.
        in_features: C.
        tokens: T, from :func:`bucket`.
        padded_out: width that each block of rows is padded to.
        padded_in: likewise for columns.
        transposed: the kernel reads W0 or ΔW along the other side, as dX does.
    """

    kernel: str
    dtype: str
    rank: int = 0
    blocks: int = 0
    out_features: int = 0
    in_features: int = 0
    tokens: int = 0
    padded_out: int = 0
    padded_in: int = 0
    transposed: bool = False


def check_key(key: Key) -> None:
    """Whether a choice can be kept for `key`.

    Raises:
        TypeError, ValueError: naming the field, what was given and what is allowed.

    Example:
        >>> check_key(Key("permute", "bf16", tokens=-1))
        Traceback (most recent call last):
        ValueError: tokens must be at least 0, got -1
    """
    check_kind("key", key, Key)
    check_choice("kernel", key.kernel, (*CONFIGS, *ALGORITHM_KEYS))
    check_choice("dtype", key.dtype, DTYPES)
    for name in key._fields[2:-1]:
        check_count(name, getattr(key, name), 0)
    check_kind("transposed", key.transposed, bool)


def bucket(tokens: int) -> int:
    """The next power of two: one choice serves 2049 to 4096 tokens, and was made for 4096."""
    return 1 << max(tokens - 1, 0).bit_length()


def shipped(key: Key, arch: str) -> tuple[Config, ...]:
    """The configurations that ship for a kernel on an architecture, largest tile first."""
    dtype, precision = DTYPES[key.dtype], "ieee" if key.dtype == "fp32" else "tf32"
    if key.kernel == "permute":
        return PERMUTE_CONFIGS
    if key.kernel in ("sum_parts", "sum_partials"):
        return SUM_CONFIGS
    if key.kernel == "block_matmul":
        return block_matmul_configs(arch, dtype, precision)
    if key.kernel == "block_grad":
        return block_grad_configs(arch, dtype, precision)
    if key.kernel == "fused_linear":
        return fused_linear_configs(arch, dtype, precision)
    return MODULATE_CONFIGS


def fits(config: Config, key: Key) -> bool:
    """Whether a tile divides the padded layout, where the kernel needs it to."""
    if isinstance(config, BlockMatmulConfig | BlockGradConfig):
        return key.padded_out % config.block_n == 0 and key.padded_in % config.block_c == 0
    return True


def heuristic(key: Key, arch: str, multiprocessors: int) -> Config:
    """Launch parameters of a kernel.

    Args:
        key: the problem, its tokens bucketed.
        arch: from `launch.architecture`, for example "sm_90".
        multiprocessors: of the device.
    """
    configs = shipped(key, arch)
    fitting = [config for config in configs if fits(config, key)]
    if key.kernel == "fused_linear":
        return _fused_linear(key, fitting, multiprocessors)
    if key.kernel == "block_matmul":
        # The largest tile that still fills the device, else the smallest.
        filling = (c for c in fitting if _tiles(key, c) >= multiprocessors)
        return next(filling, (fitting or list(configs))[-1])
    # block_grad fills the device by splitting T, the others have more tiles than multiprocessors anyway.
    return fitting[0] if fitting else configs[-1]


def _tiles(key: Key, config: Config) -> int:
    assert isinstance(config, BlockMatmulConfig)
    return -(-key.tokens // config.block_t) * key.blocks * (key.padded_out // config.block_n)


def _fused_linear(key: Key, configs: list[Config], multiprocessors: int) -> Config:
    """The narrowest tile that takes all tokens, its sum over C split where y has few tiles."""
    known = [config for config in configs if isinstance(config, FusedLinearConfig)]
    widths = {config.block_t for config in known}
    block_t = min((width for width in widths if width >= key.tokens), default=max(widths))
    fitting = [config for config in known if config.block_t == block_t]
    tiles = -(-key.tokens // block_t) * -(-key.out_features // fitting[0].block_n)
    few = tiles < 2 * multiprocessors
    return max(fitting, key=lambda config: config.split if few else -config.split)
