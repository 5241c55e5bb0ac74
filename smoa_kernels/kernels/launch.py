"""Launch parameters: one frozen dataclass per kernel and the configurations that are shipped.

Tiles are named by the dimension they cut: tokens T, rows N, columns C of W0, slots P of a padded block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = [
    "BLOCK_GRAD_CONFIGS",
    "BLOCK_MATMUL_CONFIGS",
    "FUSED_LINEAR_CONFIGS",
    "FUSED_LINEAR_IEEE_CONFIGS",
    "FUSED_LINEAR_TF32_CONFIGS",
    "MODULATE_CONFIGS",
    "PERMUTE_CONFIGS",
    "BlockGradConfig",
    "BlockMatmulConfig",
    "FusedLinearConfig",
    "ModulateConfig",
    "PermuteConfig",
    "fused_linear_configs",
]


@dataclass(frozen=True)
class ModulateConfig:
    """`modulate.py`: one tile of W0 per program."""

    block_n: int
    block_c: int
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True)
class PermuteConfig:
    """`permute.py`: one tile of gathered columns per program."""

    block_t: int
    block_p: int
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True)
class FusedLinearConfig:
    """`fused_linear.py`: one tile of y per program; `split` programs share its sum over C."""

    block_t: int
    block_n: int
    block_c: int
    split: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class BlockMatmulConfig:
    """`block_matmul.py`: one tile of y per program, `group_t` row tiles walked together for the L2 cache."""

    block_t: int
    block_n: int
    block_c: int
    group_t: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class BlockGradConfig:
    """`block_grad.py`: one tile of G per program; `split` programs share its sum over T."""

    block_n: int
    block_c: int
    block_t: int
    split: int
    num_warps: int
    num_stages: int


MODULATE_CONFIGS = (
    ModulateConfig(block_n=64, block_c=64, num_warps=4),
    ModulateConfig(block_n=32, block_c=128, num_warps=4),
    ModulateConfig(block_n=16, block_c=256, num_warps=4),
)

# Large enough for 128-bit accesses by 64-wide wavefronts too, in each of the tile's interleaved parts.
PERMUTE_CONFIGS = (
    PermuteConfig(block_t=64, block_p=128, num_warps=2),
    PermuteConfig(block_t=32, block_p=256, num_warps=2),
    PermuteConfig(block_t=128, block_p=64, num_warps=2),
)

FUSED_LINEAR_CONFIGS = (
    FusedLinearConfig(block_t=16, block_n=64, block_c=64, split=4, num_warps=4, num_stages=3),
    FusedLinearConfig(block_t=16, block_n=64, block_c=64, split=1, num_warps=4, num_stages=3),
    FusedLinearConfig(block_t=32, block_n=64, block_c=64, split=1, num_warps=4, num_stages=3),
    FusedLinearConfig(block_t=64, block_n=64, block_c=64, split=1, num_warps=4, num_stages=2),
)

# float32 in TF32: twice the bytes, half the depth.
FUSED_LINEAR_TF32_CONFIGS = (
    FusedLinearConfig(block_t=16, block_n=64, block_c=32, split=4, num_warps=4, num_stages=3),
    FusedLinearConfig(block_t=16, block_n=64, block_c=32, split=1, num_warps=4, num_stages=3),
    FusedLinearConfig(block_t=32, block_n=64, block_c=32, split=1, num_warps=4, num_stages=3),
    FusedLinearConfig(block_t=64, block_n=64, block_c=32, split=1, num_warps=4, num_stages=2),
)

# float32 in IEEE: no tensor cores on NVIDIA, and a thread holds its operands' whole depth in registers.
FUSED_LINEAR_IEEE_CONFIGS = (
    FusedLinearConfig(block_t=16, block_n=32, block_c=32, split=4, num_warps=4, num_stages=3),
    FusedLinearConfig(block_t=16, block_n=32, block_c=32, split=1, num_warps=4, num_stages=3),
    FusedLinearConfig(block_t=16, block_n=64, block_c=16, split=1, num_warps=4, num_stages=3),
)

BLOCK_MATMUL_CONFIGS = (
    BlockMatmulConfig(block_t=128, block_n=128, block_c=64, group_t=8, num_warps=8, num_stages=3),
    BlockMatmulConfig(block_t=64, block_n=128, block_c=64, group_t=8, num_warps=4, num_stages=3),
    BlockMatmulConfig(block_t=64, block_n=64, block_c=64, group_t=8, num_warps=4, num_stages=3),
)

BLOCK_GRAD_CONFIGS = (
    BlockGradConfig(block_n=128, block_c=128, block_t=64, split=1, num_warps=8, num_stages=3),
    BlockGradConfig(block_n=128, block_c=64, block_t=64, split=1, num_warps=4, num_stages=3),
    BlockGradConfig(block_n=64, block_c=64, block_t=64, split=1, num_warps=4, num_stages=3),
)


def fused_linear_configs(dtype: torch.dtype, precision: str) -> tuple[FusedLinearConfig, ...]:
    """The shipped configurations for x and W0 of `dtype` whose float32 products are rounded to `precision`."""
    if dtype != torch.float32:
        return FUSED_LINEAR_CONFIGS
    return FUSED_LINEAR_TF32_CONFIGS if precision == "tf32" else FUSED_LINEAR_IEEE_CONFIGS
