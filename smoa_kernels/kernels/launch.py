"""Launch parameters: one frozen dataclass per kernel and the configurations that are shipped.

Tiles are named by the dimension they cut: tokens T, rows N, columns C of W0, slots P of a padded block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import triton

from ..checks import cached, check_kind
from ..cost.gpus import gpu_properties

__all__ = [
    "BLOCK_GRAD_CONFIGS",
    "BLOCK_GRAD_IEEE_CONFIGS",
    "BLOCK_GRAD_TF32_CONFIGS",
    "BLOCK_MATMUL_AMD_CONFIGS",
    "BLOCK_MATMUL_AMD_FP32_CONFIGS",
    "BLOCK_MATMUL_CONFIGS",
    "BLOCK_MATMUL_IEEE_CONFIGS",
    "BLOCK_MATMUL_TF32_CONFIGS",
    "FUSED_LINEAR_AMD_CONFIGS",
    "FUSED_LINEAR_AMD_FP32_CONFIGS",
    "FUSED_LINEAR_CONFIGS",
    "FUSED_LINEAR_IEEE_CONFIGS",
    "FUSED_LINEAR_TF32_CONFIGS",
    "MODULATE_CONFIGS",
    "PERMUTE_CONFIGS",
    "SUM_CONFIGS",
    "BlockGradConfig",
    "BlockMatmulConfig",
    "Config",
    "FusedLinearConfig",
    "ModulateConfig",
    "PermuteConfig",
    "SumConfig",
    "architecture",
    "block_grad_configs",
    "block_matmul_configs",
    "fused_linear_configs",
    "multiprocessors",
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
    """`fused_linear.py`: one tile of y and up to `block_r` ranks per program; `split` programs share its sum over C."""

    block_t: int
    block_n: int
    block_c: int
    block_r: int
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
    """`block_grad.py`: one tile of G per program; `split` programs share its sum over T, 0: as fills the device."""

    block_n: int
    block_c: int
    block_t: int
    split: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class SumConfig:
    """The sums of partials in `fused_linear.py` and `block_grad.py`: `block` results per program."""

    block: int
    num_warps: int
    num_stages: int = 1


Config: TypeAlias = (
    ModulateConfig | PermuteConfig | FusedLinearConfig | BlockMatmulConfig | BlockGradConfig | SumConfig
)

MODULATE_CONFIGS = (
    ModulateConfig(block_n=64, block_c=64, num_warps=4),
    ModulateConfig(block_n=16, block_c=128, num_warps=4),
    ModulateConfig(block_n=32, block_c=128, num_warps=8),
)

# Eight results for each thread of 64-wide wavefronts too: 128 bits of half types.
SUM_CONFIGS = (
    SumConfig(block=2048, num_warps=4),
    SumConfig(block=4096, num_warps=8),
    SumConfig(block=1024, num_warps=2),
)

# Large enough for 128-bit accesses by 64-wide wavefronts too, in each of the tile's interleaved parts.
PERMUTE_CONFIGS = (
    PermuteConfig(block_t=64, block_p=128, num_warps=2),
    PermuteConfig(block_t=128, block_p=64, num_warps=2),
    PermuteConfig(block_t=128, block_p=128, num_warps=4),
)

# More ranks or tokens than these and the registers spill.
FUSED_LINEAR_CONFIGS = (
    FusedLinearConfig(16, 64, 64, block_r=64, split=4, num_warps=4, num_stages=3),
    FusedLinearConfig(16, 64, 64, block_r=64, split=2, num_warps=4, num_stages=3),
    FusedLinearConfig(16, 64, 64, block_r=64, split=1, num_warps=4, num_stages=3),
    FusedLinearConfig(32, 64, 64, block_r=32, split=1, num_warps=4, num_stages=3),
)
_FUSED_LINEAR_SM_120_CONFIGS = tuple(replace(config, block_r=32) for config in FUSED_LINEAR_CONFIGS)
FUSED_LINEAR_TF32_CONFIGS = (
    FusedLinearConfig(16, 64, 32, block_r=64, split=4, num_warps=4, num_stages=3),
    FusedLinearConfig(16, 64, 32, block_r=64, split=2, num_warps=4, num_stages=3),
    FusedLinearConfig(16, 64, 32, block_r=64, split=1, num_warps=4, num_stages=3),
)
# No tensor cores on NVIDIA, and a thread holds its operands' whole depth in registers.
FUSED_LINEAR_IEEE_CONFIGS = (
    FusedLinearConfig(16, 16, 32, block_r=16, split=4, num_warps=2, num_stages=3),
    FusedLinearConfig(16, 16, 32, block_r=16, split=2, num_warps=2, num_stages=3),
    FusedLinearConfig(16, 16, 32, block_r=16, split=1, num_warps=2, num_stages=3),
)
# AMD's wavefronts of 64: two of them, so that a thread's share of x's tile is still 128 bits.
FUSED_LINEAR_AMD_CONFIGS = (
    FusedLinearConfig(16, 64, 64, block_r=64, split=4, num_warps=2, num_stages=2),
    FusedLinearConfig(16, 64, 64, block_r=64, split=2, num_warps=2, num_stages=2),
    FusedLinearConfig(16, 64, 64, block_r=64, split=1, num_warps=2, num_stages=2),
)
FUSED_LINEAR_AMD_FP32_CONFIGS = (
    FusedLinearConfig(16, 64, 32, block_r=64, split=4, num_warps=2, num_stages=2),
    FusedLinearConfig(16, 64, 32, block_r=64, split=2, num_warps=2, num_stages=2),
    FusedLinearConfig(16, 64, 32, block_r=64, split=1, num_warps=2, num_stages=2),
)

# Largest tile first; each passes the audit wherever the functions below ship it.
_MATMUL_LARGEST = BlockMatmulConfig(256, 128, 64, group_t=8, num_warps=8, num_stages=3)
_MATMUL_TF32_LARGEST = BlockMatmulConfig(256, 128, 32, group_t=8, num_warps=8, num_stages=3)
BLOCK_MATMUL_CONFIGS = (
    BlockMatmulConfig(128, 128, 64, group_t=8, num_warps=8, num_stages=3),
    BlockMatmulConfig(64, 128, 64, group_t=8, num_warps=4, num_stages=3),
    BlockMatmulConfig(64, 64, 64, group_t=8, num_warps=4, num_stages=3),
    BlockMatmulConfig(32, 64, 64, group_t=8, num_warps=4, num_stages=3),
)
BLOCK_MATMUL_TF32_CONFIGS = (
    BlockMatmulConfig(128, 128, 32, group_t=8, num_warps=8, num_stages=3),
    BlockMatmulConfig(64, 128, 32, group_t=8, num_warps=8, num_stages=3),
    BlockMatmulConfig(64, 64, 32, group_t=8, num_warps=4, num_stages=3),
    BlockMatmulConfig(32, 64, 32, group_t=8, num_warps=4, num_stages=3),
)
# IEEE float32 has no tensor cores on NVIDIA: smaller tiles, for each thread holds its operands in registers.
BLOCK_MATMUL_IEEE_CONFIGS = (
    BlockMatmulConfig(64, 64, 16, group_t=8, num_warps=4, num_stages=3),
    BlockMatmulConfig(64, 32, 16, group_t=8, num_warps=4, num_stages=3),
    BlockMatmulConfig(32, 64, 32, group_t=8, num_warps=4, num_stages=3),
)
# AMD: 64 threads a warp, 64 KiB of shared memory; float32 has tensor cores in IEEE.
BLOCK_MATMUL_AMD_CONFIGS = (
    BlockMatmulConfig(128, 128, 64, group_t=8, num_warps=4, num_stages=2),
    BlockMatmulConfig(64, 128, 64, group_t=8, num_warps=4, num_stages=2),
    BlockMatmulConfig(64, 64, 64, group_t=8, num_warps=4, num_stages=3),
)
BLOCK_MATMUL_AMD_FP32_CONFIGS = (
    BlockMatmulConfig(128, 128, 32, group_t=8, num_warps=4, num_stages=2),
    BlockMatmulConfig(64, 128, 32, group_t=8, num_warps=4, num_stages=3),
    BlockMatmulConfig(64, 64, 32, group_t=8, num_warps=4, num_stages=3),
)

# The first needs up to 138 KiB of shared memory on NVIDIA, for H transposed: not on sm_86, sm_89 and sm_120. AMD's
# compiler makes do with 64 KiB.
BLOCK_GRAD_CONFIGS = (
    BlockGradConfig(128, 128, 64, split=0, num_warps=8, num_stages=3),
    BlockGradConfig(64, 128, 64, split=0, num_warps=8, num_stages=3),
    BlockGradConfig(128, 64, 64, split=0, num_warps=4, num_stages=3),
    BlockGradConfig(64, 64, 64, split=0, num_warps=4, num_stages=3),
)
BLOCK_GRAD_TF32_CONFIGS = (
    BlockGradConfig(128, 128, 32, split=0, num_warps=8, num_stages=3),
    BlockGradConfig(64, 128, 32, split=0, num_warps=4, num_stages=3),
    BlockGradConfig(128, 64, 32, split=0, num_warps=8, num_stages=3),
    BlockGradConfig(64, 64, 32, split=0, num_warps=4, num_stages=2),
)
BLOCK_GRAD_IEEE_CONFIGS = (
    BlockGradConfig(64, 64, 32, split=0, num_warps=8, num_stages=3),
    BlockGradConfig(64, 64, 16, split=0, num_warps=8, num_stages=3),
    BlockGradConfig(32, 64, 32, split=0, num_warps=4, num_stages=2),
)

_LARGE_SHARED_MEMORY = ("sm_80", "sm_90", "sm_100", "sm_103", "gfx942", "gfx950")
_WIDE_TENSOR_CORES = ("sm_90", "sm_100", "sm_103")
# Triton 3.6 spills block_matmul's tiles of 256 tokens, and those of 128 except in half types on sm_90; 3.9 does not.
# Between them nobody has looked.
_LARGE_TILE_TRITON = (3, 9)
_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])


def fused_linear_configs(arch: str, dtype: torch.dtype, precision: str) -> tuple[FusedLinearConfig, ...]:
    """The shipped configurations for an architecture, operands of `dtype` and float32 `precision`."""
    if arch.startswith("gfx"):
        return FUSED_LINEAR_AMD_CONFIGS if dtype != torch.float32 else FUSED_LINEAR_AMD_FP32_CONFIGS
    if dtype != torch.float32:
        return _FUSED_LINEAR_SM_120_CONFIGS if arch.startswith("sm_12") else FUSED_LINEAR_CONFIGS
    return FUSED_LINEAR_TF32_CONFIGS if precision == "tf32" else FUSED_LINEAR_IEEE_CONFIGS


def block_matmul_configs(arch: str, dtype: torch.dtype, precision: str) -> tuple[BlockMatmulConfig, ...]:
    """The shipped configurations, largest tile first.

    Args:
        arch: from :func:`architecture`.
        dtype: of xg and W0.
        precision: from `input_precision`, how float32 operands are multiplied.
    """
    full = dtype == torch.float32
    if arch.startswith("gfx"):
        return BLOCK_MATMUL_AMD_FP32_CONFIGS if full else BLOCK_MATMUL_AMD_CONFIGS
    if full and precision == "ieee":
        return BLOCK_MATMUL_IEEE_CONFIGS
    shipped: tuple[BlockMatmulConfig, ...] = BLOCK_MATMUL_TF32_CONFIGS if full else BLOCK_MATMUL_CONFIGS
    if arch in _WIDE_TENSOR_CORES:
        shipped = (_MATMUL_TF32_LARGEST if full else _MATMUL_LARGEST, *shipped)
    if _TRITON >= _LARGE_TILE_TRITON:
        return shipped
    largest = 128 if arch == "sm_90" and not full else 64
    return tuple(config for config in shipped if config.block_t <= largest)


def block_grad_configs(arch: str, dtype: torch.dtype, precision: str) -> tuple[BlockGradConfig, ...]:
    """The shipped configurations, largest tile first; arguments as :func:`block_matmul_configs`."""
    if dtype == torch.float32 and precision == "ieee" and not arch.startswith("gfx"):
        return BLOCK_GRAD_IEEE_CONFIGS
    shipped = BLOCK_GRAD_TF32_CONFIGS if dtype == torch.float32 else BLOCK_GRAD_CONFIGS
    return shipped if arch in _LARGE_SHARED_MEMORY else shipped[1:]


@cached
def architecture(device: torch.device) -> str:
    """Name of a device's architecture as the compiler spells it: "sm_90", "gfx942"; "cpu" for the interpreter.

    Raises:
        TypeError: no device.
        ValueError: neither the CPU nor a GPU that this machine has.

    Example:
        >>> architecture(torch.device("cpu"))
        'cpu'
    """
    check_kind("device", device, torch.device)
    if device.type == "cpu":
        return "cpu"
    properties = gpu_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@cached
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors (compute units) of a device; 1 for the interpreter.

    Raises:
        TypeError: no device.
        ValueError: neither the CPU nor a GPU that this machine has.

    Example:
        >>> multiprocessors(torch.device("cpu"))
        1
    """
    check_kind("device", device, torch.device)
    return 1 if device.type == "cpu" else int(gpu_properties(device).multi_processor_count)
